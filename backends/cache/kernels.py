"""What the kernels over a cache share: arguments and values that each of them takes, and how a launch that fails is told."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen.arguments import Argument
from sparsify.errors import KernelError, SparsifyError

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2E = math.log2(math.e)


def logit_arguments(softcap: bool) -> list[Argument]:
    """How products become logits in base 2: `logit_values` are their values."""
    return [Argument("tanh_scale", "fp32"), Argument("cap_log2", "fp32")] if softcap else [Argument("scale", "fp32")]


def logit_values(scale: float, softcap: float) -> dict[str, float]:
    capped = {"tanh_scale": 2 * LOG2E * scale / softcap, "cap_log2": softcap * LOG2E} if softcap > 0 else {}
    return {"scale": scale * LOG2E, **capped}


def partial_sums(sums: int, v_head_dim: int, device: torch.device) -> dict[str, Tensor]:
    """Room for the maxima, sums and weighted values of `sums` partial softmaxes, in one allocation."""
    part = torch.empty(sums * (v_head_dim + 2), dtype=torch.float32, device=device)
    return {"part_acc": part, "part_m": part[sums * v_head_dim :], "part_l": part[sums * (v_head_dim + 1) :]}


def stride_values(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """`name_axis` for each of a tensor's leading axes, which are named by letters."""
    return {f"{name}_{axis}": step for name, (tensor, axes) in tensors.items() for axis, step in zip(axes, tensor.stride())}


def turned_queries(query: Tensor, at: Tensor, sinks: int, window: int, inverse_frequencies: Tensor) -> Tensor:
    """Queries [batch, heads, query_len, head_dim] as sinks see them that stand directly before a window. at: their positions, [batch,
    query_len]."""
    from sparsify.backends.cache.reference import turn

    steps = -(at + 1 - sinks - window).clamp(min=0)[:, None]
    return turn(query.float(), steps, inverse_frequencies).to(query.dtype).contiguous()


def picked(given: dict[str, Any], arguments: Iterable[Argument]) -> dict[str, Any]:
    """Of all values, those that a kernel takes."""
    return {a.name: given[a.name] for a in arguments}


@contextlib.contextmanager
def launching(what: str, query: Tensor) -> Iterator[None]:
    """Compiles and launches on the query's device.

    Raises:
        KernelError: in place of what Triton raises.
    """
    try:
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            yield
    except SparsifyError:
        raise
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        raise KernelError(f"{type(error).__name__}: {last}", where=what, hint="kernels = 'reference' is exact") from error


def launch_in_turn(
    what: str,
    query: Tensor,
    module_of: Callable[[], ModuleType],
    arguments_of: Callable[[str], Iterable[Argument]],
    given: dict[str, Any],
    *kernels: tuple[str, tuple[int, int], dict[str, int]],
) -> None:
    """Launches kernels of one module one after the other.

    Args:
        module_of: generates and loads the module. arguments_of: what a kernel takes, by its name.
        given: values by name, those that no kernel takes among them.
        kernels: name, grid and Triton's launch options of each.

    Raises:
        KernelError: a kernel could not be compiled or launched.
    """
    with launching(what, query):
        module = module_of()
        for name, grid, options in kernels:
            getattr(module, name)[grid](**picked(given, arguments_of(name)), **options)
