"""Custom ops of feed-forward blocks that rows may skip, beside those of `sparsify.ops.attention`. Schemas and fake kernels only.

`remaining`, int32 [rows], says for every row of the residual stream what the next block does:

    n > 0   skip: out = residual, the row's n falls by one
    0       compute; when cosine(residual, out) >= threshold the row's next `skip_next` blocks are skipped
    -1      compute, and stay -1: the row is dense throughout this forward

`ffn_start` makes it once per forward, `ffn` takes it and returns the next one, so counters live within one forward, on the device. A
similarity of NaN reaches no threshold. Rows do not read each other.

    ffn(x) = scale · post_norm(down · h + down_bias),  h = act(gate · n + gate_bias) · (up · n + up_bias),  n = norm(input)
    out = residual + ffn(x)

layout "plain": h = act(up · n + up_bias). "gate_up", "up_gate": both in `up`, in that order. Norms are those of
`sparsify.matching.sites.Norm`.

`ffn_start` counts generated tokens from positions alone: a decode step whose position follows the position before belongs to the same
run, anything else (a prompt came between, or another sequence) starts a new one. age = position - the run's first position.

    age < warmup   remaining = -1
    otherwise      remaining = most · min(age, length) // length  (most where length is 0): the first blocks are skipped, so the
                   active ones are the top ones and their sets nest (SkipDecode, arXiv 2307.02628)

The run's two numbers are kept on the device under `key`, for each model and thread (`counting`). Sequences that take turns there look like
new runs: they stay dense.
`ffn_prompt` copies what it is given and ends the run of `key`, so that tokens after a prompt are a new run wherever they stand.

`ffn_parts` computes down · h + down_bias for some rows after the others, so that h exists for `part_rows` rows at a time. Its input is
normalised already; scale, norm and sum follow it. It rounds what h is made of, and h itself, to the input's dtype.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Generator, Iterable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify.graph.typed_torch import define_op, without_modes
from sparsify.ops.library import TAGS, library, traced

# Compiled graphs are cached by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 1


define_op(
    library,
    "ffn_start(Tensor like, Tensor? positions, SymInt slot, *, int warmup, int most, int length, int key, int version) -> Tensor",
    TAGS,
)
define_op(
    library,
    "ffn(Tensor residual, Tensor input, Tensor remaining, Tensor up, Tensor down, *, Tensor? gate=None, Tensor? up_bias=None, "
    "Tensor? gate_bias=None, Tensor? down_bias=None, Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? post_weight=None, "
    "Tensor? post_bias=None, str layout, bool transposed, str activation, str norm, float eps, str post_norm, float post_eps, float scale, "
    "float threshold, int skip_next, int version) -> (Tensor, Tensor)",
    TAGS,
)


define_op(library, "ffn_prompt(Tensor like, *, int key, int version) -> Tensor", TAGS)
define_op(
    library,
    "ffn_parts(Tensor input, Tensor up, Tensor down, *, Tensor? gate=None, Tensor? up_bias=None, Tensor? gate_bias=None, "
    "Tensor? down_bias=None, str layout, bool transposed, str activation, int part_rows, int version) -> Tensor",
    TAGS,
)


def rows_of(hidden: Tensor) -> int:
    """Rows of [..., hidden]."""
    rows = 1
    for size in hidden.shape[:-1]:
        rows = rows * size
    return rows


def _start_fake(
    like: Tensor, positions: Tensor | None, slot: int, *, warmup: int, most: int, length: int, key: int, version: int
) -> Tensor:
    return like.new_empty(rows_of(like), dtype=torch.int32)


def _ffn_fake(residual: Tensor, input: Tensor, remaining: Tensor, up: Tensor, down: Tensor, **call: object) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), torch.empty_like(remaining)


def _prompt_fake(like: Tensor, *, key: int, version: int) -> Tensor:
    return torch.empty_like(like)


def _parts_fake(input: Tensor, up: Tensor, down: Tensor, *, transposed: bool, **call: object) -> Tensor:
    return input.new_empty((*input.shape[:-1], down.shape[1 if transposed else 0]))


traced("ffn_prompt", _prompt_fake)
traced("ffn_start", _start_fake)
traced("ffn", _ffn_fake)
traced("ffn_parts", _parts_fake)

ffn_start = torch.ops.sparsify.ffn_start.default
ffn_prompt = torch.ops.sparsify.ffn_prompt.default
ffn = torch.ops.sparsify.ffn.default
ffn_parts = torch.ops.sparsify.ffn_parts.default

Observer = Callable[[Tensor, Tensor], None]
_observers: contextvars.ContextVar[tuple[Observer, ...]] = contextvars.ContextVar("sparsify_ffn_observers", default=())


@contextlib.contextmanager
def observing(observer: Observer) -> Generator[None]:
    """Calls `observer(remaining before, remaining after)` after each feed-forward block that runs here. Reading them synchronises."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observers() -> tuple[Observer, ...]:
    """Who observes feed-forward blocks here."""
    return _observers.get()


# no position follows it
_NO_POSITION = -2
Runs = dict[tuple[torch.device, int], Tensor]


class _Thread(threading.local):
    """A thread's runs, by a weight of the model, and those of calls outside of any compiled model."""

    def __init__(self) -> None:
        self.by_weight: MutableMapping[Tensor, Runs] = WeakTensorKeyDictionary()
        self.other: Runs = {}


_thread = _Thread()
_here: contextvars.ContextVar[Runs | None] = contextvars.ContextVar("sparsify_ffn_runs", default=None)


@contextlib.contextmanager
def counting(weight: Tensor | None, keys: Iterable[tuple[torch.device, int]]) -> Generator[None]:
    """In this block, in this thread, generated tokens of the model with this weight are counted; None: of no model in particular.

    keys: device and key of the runs that are needed, so that they lie outside of the memory of a CUDA graph that is recorded here.
    """
    runs = _thread.other if weight is None else _thread.by_weight.setdefault(weight, {})
    token = _here.set(runs)
    try:
        for device, key in keys:
            run_state(device, key)
        yield
    finally:
        _here.reset(token)


def run_state(device: torch.device, key: int) -> Tensor:
    """int64 [2] on `device`: the last decode step's position and its run's first position."""
    found = _here.get()
    runs = _thread.other if found is None else found
    if (device, key) not in runs:
        with without_modes():
            runs[device, key] = torch.full((2,), _NO_POSITION, dtype=torch.int64, device=device)
    return runs[device, key]


def forget_runs() -> None:
    """The next decode step of every model in this thread starts a new run."""
    for runs in (_thread.other, *_thread.by_weight.values()):
        for state in runs.values():
            state.fill_(_NO_POSITION)


def end_run(device: torch.device, key: int) -> None:
    """The next decode step under `key` starts a new run. Asks nothing of the device, so that a CUDA graph may record it."""
    run_state(device, key).fill_(_NO_POSITION)
