"""Calls of the kernels beside attention for compute-sanitizer: linear and feed-forward layers, and choosing tokens. `run` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsify.backends import farthest
from sparsify.backends.ffn import few_rows, in_parts
from sparsify.backends.linear import triton as linear
from sparsify.ops import feed_forward
from sparsify.ops.farthest import FarthestFirstCall
from sparsify.ops.linear import LinearCall

_HIDDEN, _INTERMEDIATE = 520, 1320  # 16 bytes divide a row, tiles do not
_LAYER = {
    "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": 1e-5, "post_norm": "none", "post_eps": 0.0,
    "scale": 1.0, "threshold": 0.9, "skip_next": 2, "version": feed_forward.VERSION,
}  # fmt: skip


def linear_cases(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    norm = {"norm": "rms", "norm_weight": draw(_HIDDEN), "eps": 1e-5}
    weight = lambda outputs, inputs=_HIDDEN: draw(outputs, inputs)
    for rows in (1, 3, 16):
        x, normed = draw(rows, _HIDDEN), norm if rows == 1 else {}
        calls = {
            "three": LinearCall(x, weight(520), weight_2=weight(136), weight_3=weight(136), **normed),
            "biased": LinearCall(x, weight(1000), weight_2=weight(72), bias=draw(1000), bias_2=draw(72)),
            "gate": LinearCall(x, weight(1320), weight_2=weight(1320), activation="silu", **normed),
            "sum": LinearCall(draw(rows, 1320), weight(_HIDDEN, 1320), residual=x),
            "odd": LinearCall(draw(rows, 1001), weight(77, 1001)),
        }
        for name, call in calls.items():
            call.check()
            yield f"{rows} rows, {name}", lambda call=call: linear.linear(call)


def ffn_cases(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for rows in (1, 5, 32, 130):
        yield f"{rows} rows", lambda rows=rows: _ffn(device, rows)
    yield "5 rows, plain, layer norms, biases", lambda: _ffn(device, 5, layout="plain", activation="relu", norm="layer", post_norm="layer")
    yield "in parts", lambda: _in_parts(device, 300)
    for left in (1, 9):
        at, like = torch.tensor(left, device=device), torch.zeros(3, 1, 8, dtype=torch.bfloat16, device=device)
        start = {"warmup": 4, "most": 64, "length": 16, "key": 1, "version": feed_forward.VERSION}
        yield f"starting at {left}", lambda at=at, like=like, start=start: few_rows.ffn_start(like, at, 0, **start)


def _weights(device: str, norms: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    more = {}
    for name, kind in zip(("norm", "post"), norms, strict=True):
        more |= {f"{name}_weight": draw(_HIDDEN)} if kind != "none" else {}
        more |= {f"{name}_bias": draw(_HIDDEN)} if kind == "layer" else {}
    return draw(_INTERMEDIATE, _HIDDEN), draw(_HIDDEN, _INTERMEDIATE), more


def _ffn(device: str, rows: int, **changes: Any) -> None:
    call = {**_LAYER, **changes}
    up, down, more = _weights(device, (call["norm"], call["post_norm"]))
    if call["layout"] == "plain":
        more |= {"up_bias": up[:, 0].contiguous(), "down_bias": down[:, 0].contiguous()}
    else:
        more["gate"] = up.flip(0)
    x = torch.randn(rows, 1, _HIDDEN, device=device, dtype=torch.bfloat16)
    remaining = (torch.arange(rows, device=device) % 4 - 1).to(torch.int32)
    few_rows.ffn(x, x.clone(), remaining, up, down, **call, **more)


def _in_parts(device: str, rows: int) -> None:
    up, down, _ = _weights(device, ("none", "none"))
    x = torch.randn(1, rows, _HIDDEN, device=device, dtype=torch.bfloat16)
    parts = {"layout": "split", "transposed": False, "activation": "silu", "part_rows": 128, "version": feed_forward.VERSION}
    in_parts.with_kernel(x, up, down, gate=up.flip(0), **dict.fromkeys(("up_bias", "gate_bias", "down_bias")), **parts)


def token_cases(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for tokens in (70, 600):
        points = torch.randn(2, tokens, 8, device=device)
        call = FarthestFirstCall(torch.cdist(points, points), torch.tensor([tokens, 9], device=device), steps=40)
        call.check()
        yield f"far apart of {tokens}", lambda call=call: farthest.by_kernel(call)
