"""What the feed-forward benchmarks share: the bandwidth of a run, blocks of a model's shape, records."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ffn import FfnStack
from benchmarks.lib import models, records
from sparsify.commands.bench.clock import Clock
from sparsify.ops import feed_forward

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Of one block; `layers` of them make a stack."""

    hidden: int
    intermediate: int
    layers: int


SHAPES = {
    name: Shape(given["hidden_size"], given["intermediate_size"], given["num_hidden_layers"]) for name, given in models.SHAPES.items()
}


def bandwidth(device: str) -> dict[str, float]:
    """Bytes a second by three ways to move 2 GB: a copy (read plus written), a sum and a matrix-vector product (read alone)."""
    size = 1 << (31 if device == "cuda" else 22)
    numbers = torch.ones(size // 4, dtype=torch.float32, device=device)
    matrix = numbers.view(torch.bfloat16).view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.bfloat16, device=device)
    half = size // 8
    clock = Clock(device)
    ways = {
        "copy": lambda: numbers[:half].copy_(numbers[half:]),
        "sum": lambda: numbers.sum(),
        "product": lambda: matrix @ vector,
    }
    return {name: size / (1e-3 * min(clock.samples(clock.graph(way), 20))) for name, way in ways.items()}


def block_weights(shape: Shape, device: str, layers: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Random weights of `layers` blocks, bf16; the timing does not depend on them."""
    draw = lambda *sizes: torch.empty(*sizes, device=device, dtype=torch.bfloat16).normal_(0, 0.02)
    return [
        {
            "up": draw(shape.intermediate, shape.hidden),
            "gate": draw(shape.intermediate, shape.hidden),
            "down": draw(shape.hidden, shape.intermediate),
            "norm_weight": draw(shape.hidden) + 1,
        }
        for _ in range(layers or shape.layers)
    ]


def plain(x: torch.Tensor, weights: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The blocks as transformers writes them."""
    for w in weights:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        n = w["norm_weight"] * wide.to(x.dtype)
        linear = torch.nn.functional.linear
        x = x + linear(torch.nn.functional.silu(linear(n, w["gate"])) * linear(n, w["up"]), w["down"])
    return x


def ours(x: torch.Tensor, weights: list[dict[str, torch.Tensor]], flags: torch.Tensor) -> torch.Tensor:
    """The same through the op; flags int32 [layers, rows] are what each block reads as its rows' counters."""
    fixed = {
        "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": EPS, "post_norm": "none", "post_eps": 0.0,
        "scale": 1.0, "threshold": 2.0, "skip_next": 1, "version": feed_forward.VERSION,
    }  # fmt: skip
    for w, remaining in zip(weights, flags, strict=True):
        x, _ = feed_forward.ffn(x, x, remaining, w["up"], w["down"], gate=w["gate"], norm_weight=w["norm_weight"], **fixed)
    return x


def spread(share: float, layers: int) -> list[int]:
    """So many of the layers, evenly spread."""
    count = round(share * layers)
    return [int((i + 0.5) * layers / count) for i in range(count)]


def note(
    options: argparse.Namespace, record: type[FfnStack], *, times: list[float], shape: Shape, rate: dict[str, float], **values: Any
) -> None:
    """Appends a record and prints it. rate: what `bandwidth` found; the fastest way counts as the device's."""
    ms = statistics.median(times)
    layers = values.setdefault("layers", shape.layers)
    size = layers * 3 * shape.hidden * shape.intermediate * 2
    facts = {"bytes": size, "bandwidth": max(rate.values()), "bandwidths": rate, "shape": dataclasses.asdict(shape)}
    records.append(options.out, record(ms=ms, times_ms=times, **facts, **values))
    streamed = 1e3 * size * (1 - values["share"]) / max(rate.values())
    print(f"{record.NAME} {values}: {ms:.3f} ms (min {min(times):.3f}); the computed blocks' bytes take {streamed:.3f} ms", flush=True)
