"""What a forecast says, as records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Seconds:
    """Where the time of one call goes. projections: matrix products outside the feed-forward blocks that the compiler reads. cache: scoring
    and storing a prompt. host: what a step waits for between tokens."""

    attention: float = 0.0
    feed_forward: float = 0.0
    projections: float = 0.0
    elementwise: float = 0.0
    cache: float = 0.0
    head: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Memory:
    """Bytes. cache: after the prompt. scratch: the most that prefill needs at once beside weights and cache."""

    weights: int
    cache: int
    scratch: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.scratch


@dataclass(frozen=True)
class Group:
    """Layers at which the same is done for the same reasons.

    what: "attention", "cache" or "ffn". sees: what tells their attention from other layers'. choice: in one word or two. density: expected
    share of causal blocks, None when exact.
    """

    phase: str
    what: str
    layers: tuple[int, ...]
    sees: str
    choice: str
    reason: str
    density: float | None = None
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One way to run the model: exact attention alone, or what the configuration chooses."""

    prefill: Seconds
    decode: Seconds
    memory: Memory
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Row:
    length: int
    dense: Side
    chosen: Side


@dataclass(frozen=True)
class Crossover:
    """From `length` tokens on `after` is chosen instead of `before`."""

    phase: str
    layers: tuple[int, ...]
    sees: str
    length: int
    before: str
    after: str


@dataclass(frozen=True)
class Forecast:
    """Rows by length, crossovers, and in words what the numbers rest on. source: of the device's numbers."""

    model: str
    parameters: int
    dtype: str
    batch: int
    device: str
    source: str
    measured: bool
    cache: str
    layers: int
    rows: tuple[Row, ...]
    crossovers: tuple[Crossover, ...]
    notes: tuple[str, ...] = ()
