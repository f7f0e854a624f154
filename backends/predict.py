"""Which kernels a graph is going to launch: its op calls are made on tensors without memory, and what would be launched is written down.

The sizes are those of the graph's first call, then others that later calls may have: which kernel serves a call depends on its lengths
here and there, such as on whether all keys fit into a cache of the device. A guess that is wrong costs a compilation that nobody needed; a
kernel that was not foreseen is compiled when it is launched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from sparsify.backends import dispatch, registration
from sparsify.backends.codegen import ahead
from sparsify.backends.codegen.launch import capability, meaning
from sparsify.graph.compat import prepare_inductor, symbol_values, use_inductors_kernel_cache
from sparsify.ops.library import NAMESPACE

log = logging.getLogger(__name__)

# lengths of later calls beside those of the first; a size below _SHORT is no length
_FACTORS = (4.0, 0.25, 2.0, 0.5)
_SHORT = 64
_WARP = 32


def start(device: torch.device, kernels: str = "auto") -> None:
    """Starts what compiles ahead, Inductor's processes too, where kernels run on this device. kernels: the setting of that name."""
    if (found := _compiler(device, kernels)) is not None:
        found.start()
        prepare_inductor()


def compiles_ahead(device: torch.device, kernels: str = "auto") -> bool:
    """Whether a graph's kernels are compiled ahead on a device; nothing is started. kernels: the setting of that name."""
    return _compiler(device, kernels) is not None


def compile_ahead(gm: fx.GraphModule, kernels: str = "auto") -> None:
    """Has the kernels of a rewritten graph compiled in a process of their own, those of its first call first. Returns at once.

    kernels: the setting of that name.
    """
    values = (_value(read) for node in gm.graph.nodes if _op(node) for read in node.all_input_nodes)
    try:
        for device in dict.fromkeys(value.device for value in values if isinstance(value, torch.Tensor)):
            if (compiler := _compiler(device, kernels)) is not None:
                with dispatch.serving(kernels):
                    compiler.submit(foreseen(gm, device))
    except Exception as error:  # nothing depends on it
        log.debug("kernels are compiled when they are launched", exc_info=error)


def _compiler(device: torch.device, kernels: str) -> ahead.Compiler | None:
    if device.type != "cuda" or torch.version.hip is not None or dispatch.available(device, kernels)[0] != "triton":
        return None
    use_inductors_kernel_cache(device)  # before the process starts, which takes it over
    major, minor = capability(device)
    return ahead.compiler(("cuda", 10 * major + minor, _WARP))


def foreseen(gm: fx.GraphModule, device: torch.device) -> Iterator[ahead.Planned]:
    """What the graph's calls launch on a device: at the sizes of its first call, then at other lengths."""
    calls = [node for node in gm.graph.nodes if _op(node)]
    known = _known_sizes(calls)
    lengths = [symbol for symbol, size in known.items() if size >= _SHORT]
    for factor in (1.0, *(_FACTORS if lengths else ())):
        scaled = {symbol: max(_SHORT, int(known[symbol] * factor) // 16 * 16) + known[symbol] % 16 for symbol in lengths}
        sizes = known if factor == 1.0 else {**known, **scaled}
        met = set()
        for node in calls:
            args, kwargs = map_aggregate((node.args, node.kwargs), functools.partial(_concrete, sizes))
            form = repr((_op(node), map_aggregate((args, kwargs), _form)))
            if form not in met:  # layers are alike
                met.add(form)
                yield from launches(_op(node), args, kwargs, device)


def launches(op: str, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> list[ahead.Planned]:
    """What a call of one of our ops launches on a device; what can be told of it, where the host looks at numbers.

    args, kwargs: with tensors on `meta`.
    """
    # over a text that processes share, kernels are those of a part of it, and nothing is exchanged here
    kwargs = {name: value for name, value in kwargs.items() if name != "sequence"}
    with ahead.recording() as found, meaning(device), torch.no_grad():
        try:
            registration.SERVED[op](*args, **kwargs)
        except Exception as error:
            log.debug("not all launches of %s are foreseen", op, exc_info=error)
    return found


def _op(node: fx.Node) -> str:
    """The name of our op that a node calls, "" where it calls none."""
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket) else ""
    space, _, op = name.partition(".")
    op = op.partition(".")[0]
    return op if space == NAMESPACE and op in registration.SERVED else ""


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _known_sizes(calls: list[fx.Node]) -> dict[sympy.Symbol, int]:
    """The sizes of the first call, by the symbols of the graph."""
    for node in (read for call in calls for read in call.all_input_nodes):
        mode = getattr(_value(node), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return {symbol: int(size) for symbol, size in symbol_values(mode.shape_env).items() if size.is_integer}
    return {}


def _concrete(sizes: Mapping[sympy.Symbol, int], value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = _value(value)
    if isinstance(value, torch.Tensor):
        size, stride = ([_concrete(sizes, number) for number in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(size, stride, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.xreplace(sizes))
    return value


def _form(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value
