"""`sparsify::ffn` and `sparsify::ffn_start` in plain PyTorch, on any device: the block's own operations, then a choice by row.

Every row is computed and none is saved; nothing asks the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.errors import UnsupportedError
from sparsify.ops import feed_forward

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def ffn_start(like: Tensor, positions: Tensor | None, slot: int, *, warmup: int, most: int, length: int, key: int, version: int) -> Tensor:
    """int32 [rows]: what each row does in this forward, by the age of its run (see `sparsify.ops.feed_forward`)."""
    rows = feed_forward.rows_of(like)
    if positions is None and slot < 0:
        age = torch.zeros((), dtype=torch.int64, device=like.device)
    else:
        position = torch.full((), slot, dtype=torch.int64, device=like.device) if positions is None else positions.max()
        state = feed_forward.run_state(like.device, key)
        first = torch.where(position == state[0] + 1, state[1], position)
        state.copy_(torch.stack([position, first]))
        age = position - first
    skipped = age.clamp(max=length) * most // length if length else torch.full_like(age, most)
    return torch.where(age < warmup, -1, skipped).to(torch.int32).expand(rows).contiguous()


def ffn_prompt(like: Tensor, *, key: int, version: int) -> Tensor:
    """A copy of `like`; the run of `key` ends."""
    feed_forward.end_run(like.device, key)
    return like.clone(memory_format=torch.contiguous_format)


def ffn(
    residual: Tensor,
    input: Tensor,
    remaining: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    layout: str,
    transposed: bool,
    activation: str,
    norm: str,
    eps: float,
    post_norm: str,
    post_eps: float,
    scale: float,
    threshold: float,
    skip_next: int,
    version: int,
) -> tuple[Tensor, Tensor]:
    """(out like residual, remaining int32 [rows]).

    Raises:
        UnsupportedError: another layout, activation or norm.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"no activation {activation!r}", where="reference ffn")
    act = ACTIVATIONS[activation]
    x = normed(input, norm, norm_weight, norm_bias, eps)
    wide = _linear(x, up, up_bias, transposed)
    if layout == "split":
        assert gate is not None
        wide = act(_linear(x, gate, gate_bias, transposed)) * wide
    elif layout in ("gate_up", "up_gate"):
        first, second = wide.chunk(2, dim=-1)
        wide = act(first) * second if layout == "gate_up" else act(second) * first
    elif layout == "plain":
        wide = act(wide)
    else:
        raise UnsupportedError(f"no layout {layout!r}", where="reference ffn")
    update = _linear(wide, down, down_bias, transposed)
    if scale != 1.0:
        update = update * scale
    computed = residual + normed(update, post_norm, post_weight, post_bias, post_eps)
    skipped = remaining > 0
    out = torch.where(skipped.view(*residual.shape[:-1], 1), residual, computed)
    alike = similarity(residual, out).flatten() >= threshold
    after = torch.where(alike & (remaining == 0), skip_next, remaining.clamp(max=0))
    return out, torch.where(skipped, remaining - 1, after).to(torch.int32)


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine in float32 over the last dimension, within [-1, 1]; 0 for a zero vector."""
    before, after = before.float(), after.float()
    scale = torch.sqrt(before.pow(2).sum(-1) * after.pow(2).sum(-1)).clamp(min=1e-30)
    return ((before * after).sum(-1) / scale).clamp(-1, 1)


def normed(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norms of `sparsify.matching.sites.Norm`, with the roundings of their source."""
    if kind == "none":
        return x
    if kind == "layer":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = x.float()
    if weight is None:
        raise UnsupportedError(f"no norm {kind!r} without a weight", where="reference ffn")
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if kind == "rms":
        return weight * unit.to(x.dtype)
    if kind == "rms_fp32":
        return (weight * unit).to(x.dtype)
    if kind == "rms_offset":
        return (unit * (1.0 + weight.float())).to(x.dtype)
    raise UnsupportedError(f"no norm {kind!r}", where="reference ffn")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return product.view(*x.shape[:-1], weight.shape[1])
