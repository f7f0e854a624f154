"""What a forecast says, as records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Seconds:
    """Where the time of one call goes, in seconds.

    attention, feed_forward: what the compiler reads as such.
    projections: matrix products outside of those feed-forward blocks.
    elementwise: norms, activations, rotations and sums.
    cache: scoring and storing a prompt.
    head: the product that gives logits.
    host: what a step waits for between tokens.
    exchange: what is waited for of what GPUs that share the model send each other.
    """

    attention: float = 0.0
    feed_forward: float = 0.0
    projections: float = 0.0
    elementwise: float = 0.0
    cache: float = 0.0
    head: float = 0.0
    host: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Memory:
    """Memory of the device, in bytes.

    weights: of the model.
    cache: after the prompt.
    scratch: the most that prefill needs at once beside weights and cache.
    """

    weights: int
    cache: int
    scratch: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.scratch


@dataclass(frozen=True)
class Group:
    """Layers at which the same is done for the same reasons.

    phase: "prefill" or "decode".
    what: "attention", "cache", "ffn", "stream": the tokens behind a layer, or "token": layers that generated tokens bypass.
    layers: their numbers.
    sees: what tells their attention from other layers'.
    choice: the method, in one word or two.
    reason: why it is chosen.
    density: expected share of causal blocks, None when exact.
    refusals: of other methods, with their reasons.
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
    """One way to run the model: exact attention alone, or what the configuration chooses.

    prefill, decode: of the whole prompt, and of one step after it.
    memory: the most that is needed, of one GPU.
    groups: of layers at which the same is done.
    sent: bytes that a GPU sends at most for the prompt, by what they are.
    """

    prefill: Seconds
    decode: Seconds
    memory: Memory
    groups: tuple[Group, ...]
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Both ways to run the model at one prompt length.

    length: tokens.
    dense: exact attention alone.
    chosen: what the configuration chooses.
    """

    length: int
    dense: Side
    chosen: Side


@dataclass(frozen=True)
class Crossover:
    """From a length on another method is chosen.

    phase: "prefill" or "decode".
    layers: their numbers.
    sees: what tells their attention from other layers'.
    length: tokens from which on `after` is chosen instead of `before`.
    before, after: the choices, in one word or two.
    """

    phase: str
    layers: tuple[int, ...]
    sees: str
    length: int
    before: str
    after: str


@dataclass(frozen=True)
class Forecast:
    """What a model costs on a device.

    model: its name.
    parameters: how many.
    dtype: of the weights.
    batch: sequences.
    device: its name.
    source: where the device's numbers come from.
    measured: whether they were measured on such a device.
    cache: the policy and its budget, for people.
    layers: how many.
    rows: forecasts, by length.
    crossovers: lengths from which on another method is chosen.
    notes: in words, what the numbers rest on.
    gpus: that share the model. sharing: how, for people.
    """

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
    gpus: int = 1
    sharing: str = ""
