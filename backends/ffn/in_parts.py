"""`sparsify::ffn_parts`: the products by torch's library, written into buffers that all parts share, and the activation between them either
in plain PyTorch or by a generated kernel that writes where it read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import DTYPES, launch, launching, need
from sparsify.backends.ffn.reference import ACTIVATIONS
from sparsify.backends.ffn.source import ACTIVATION_BLOCK, activation_arguments, activation_source
from sparsify.errors import UnsupportedError
from sparsify.ops import feed_forward
from sparsify.ops.limits import cdiv

_WHERE = "sparsify::ffn_parts"

# (what is activated, its factor or None) -> their product, which may be written over what is activated
Activate = Callable[[Tensor, Tensor | None], Tensor]


def plain(input: Tensor, up: Tensor, down: Tensor, **call: Any) -> Tensor:
    """See `sparsify.ops.feed_forward`. Raises UnsupportedError for another layout or activation."""
    if call["activation"] not in ACTIVATIONS:
        raise UnsupportedError(f"no activation {call['activation']!r}", where="reference ffn_parts")
    act = ACTIVATIONS[call["activation"]]
    return _in_parts(input, up, down, lambda x, factor: act(x) if factor is None else act(x) * factor, **call)


def with_kernel(input: Tensor, up: Tensor, down: Tensor, **call: Any) -> Tensor:
    """See `sparsify.ops.feed_forward`.

    Raises:
        UnsupportedError: another dtype, layout or activation.
        KernelError: the kernel could not be compiled or launched.
    """
    need(input.dtype in DTYPES, f"dtype {input.dtype}", _WHERE)
    gated, dtype = call["layout"] != "plain", DTYPES[input.dtype]
    module, arguments = _kernel(dtype, call["activation"], gated), activation_arguments(dtype)

    def activate(x: Tensor, factor: Tensor | None) -> Tensor:
        factor = x if factor is None else factor
        rows, width = x.shape
        values = {"x": x, "factor": factor, "width": width, "x_row": x.stride(0), "factor_row": factor.stride(0)}
        launch(module.activate_rows, (rows, cdiv(width, ACTIVATION_BLOCK)), arguments, values, num_warps=4)
        return x

    with launching(input.device, lambda: f"{_WHERE} ({dtype}, {call['activation']})"):
        return _in_parts(input, up, down, activate, **call)


@functools.cache
def _kernel(dtype: str, activation: str, gated: bool) -> Any:
    return source.load(activation_source(dtype, activation, gated), "ffn_activation")


def _in_parts(
    input: Tensor,
    up: Tensor,
    down: Tensor,
    activate: Activate,
    *,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
    transposed: bool,
    activation: str,
    part_rows: int,
    version: int,
) -> Tensor:
    rows = feed_forward.rows_of(input)
    turned = lambda weight: weight if transposed else weight.t()
    up, down = turned(up), turned(down)
    x = input.reshape(rows, input.shape[-1])
    out = x.new_empty(rows, down.shape[1])
    wide = x.new_empty(min(rows, part_rows), up.shape[1])
    # one buffer for all parts: blocks of one size are what the allocator finds again
    gates = torch.empty_like(wide) if layout == "split" else wide
    for first in range(0, rows, part_rows):
        part = x[first : first + part_rows]
        count = part.shape[0]
        made = _product(part, up, up_bias, wide[:count])
        if layout == "split":
            assert gate is not None
            h = activate(_product(part, turned(gate), gate_bias, gates[:count]), made)
        elif layout in ("gate_up", "up_gate"):
            halves = made.chunk(2, dim=-1)
            h = activate(*(halves if layout == "gate_up" else halves[::-1]))
        elif layout == "plain":
            h = activate(made, None)
        else:
            raise UnsupportedError(f"no layout {layout!r}", where=_WHERE)
        _product(h, down, down_bias, out[first : first + count])
    return out.view(*input.shape[:-1], out.shape[1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
