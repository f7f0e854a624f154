"""What a run that trains the model of word pieces is: sizes, data and schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """batch_tokens: of a step and GPU. lr: peak. stages: from which share of the training time on, which lengths with which weights."""

    vocabulary: int = 8192
    hidden: int = 512
    layers: int = 7
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    inner: int = 1408
    theta: float = 500_000.0
    positions: int = 32768
    batch_tokens: int = 65536
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 150  # steps
    decay: float = 0.4  # share of the time, at the end, over which the rate falls to 2 %
    answer_weight: float = 1.0
    tokenizer_characters: int = 24_000_000
    stages: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = (
        (0.0, ((512, 1.0),)),
        (0.07, ((512, 0.3), (1024, 0.7))),
        (0.15, ((512, 0.1), (1024, 0.2), (2048, 0.65), (8192, 0.05))),
        (0.35, ((1024, 0.1), (2048, 0.6), (4096, 0.15), (8192, 0.1), (16384, 0.05))),
        (0.50, ((2048, 0.3), (4096, 0.15), (8192, 0.4), (16384, 0.15))),
        (0.68, ((2048, 0.15), (8192, 0.2), (16384, 0.55), (32768, 0.1))),
    )
    look: tuple[int, ...] = (2048, 8192, 16384, 32768)  # lengths of the evaluation
    seed: int = 0


TOY = Setup(
    vocabulary=1024, hidden=64, layers=2, heads=4, kv_heads=1, head_dim=32, inner=128, positions=2048, batch_tokens=2048, warmup=20,
    tokenizer_characters=300_000, stages=((0.0, ((256, 1.0),)), (0.5, ((256, 0.5), (1024, 0.5)))), look=(256, 1024),
)  # fmt: skip


def rate_of(setup: Setup, step: int, fraction: float) -> float:
    """Warm-up by step; a plateau; then a linear decay by time to 2 % of the peak."""
    return setup.lr * min(1.0, (step + 1) / setup.warmup) * min(1.0, 0.02 + 0.98 * max(0.0, 1 - fraction) / setup.decay)


def length_of(setup: Setup, step: int, fraction: float) -> int:
    """The length of a step's sequences: the same on every GPU, so that none waits for the others."""
    lengths = [mix for start, mix in setup.stages if fraction >= start][-1]
    return random.Random(f"{setup.seed} {step}").choices([n for n, _ in lengths], [weight for _, weight in lengths])[0]
