"""The earliest layer, its heads and the fewest tokens that keep the answers, by running them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import sparsify
from sparsify.commands.calibrate.tokens import losses
from sparsify.commands.calibrate.tokens.heads import choose_heads, looks
from sparsify.commands.calibrate.tokens.losses import Answers, Loss
from sparsify.commands.calibrate.tokens.pieces import Piece, cut
from sparsify.errors import UnsupportedError
from sparsify.passes.token_select import TokenSelect
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import Calibration, provenance_of


@dataclass(frozen=True)
class Asked:
    """What is tried.

    method: options that stay as they are, such as `window`; of these `heads` is used where it is named.
    length: tokens of the prompts. keeps: numbers of tokens that go on, rising.
    count: pieces of the text, each of which gives one prompt that goes on and one that repeats a passage.
    cue, answer: tokens of the passage that are repeated, and of what has to follow. seed: chooses pieces and passages.
    budget: nats that a token of the answers may lose, the mean over the prompts of the worse kind.
    """

    method: TokenSelect
    length: int
    keeps: tuple[int, ...]
    count: int
    cue: int
    answer: int
    seed: int
    budget: float

    def digest(self) -> str:
        facts = {**vars(self), "method": self.method.options()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Point:
    """What was run.

    losses: by kind of prompts. held: share of what later layers look at that the chosen tokens hold, without running them.
    seconds, dense_seconds: of a whole prompt, predicted.
    """

    method: TokenSelect
    losses: dict[str, Loss]
    held: float
    seconds: float
    dense_seconds: float

    @property
    def loss(self) -> float:
        """Nats a token, of the worse kind of prompts; infinite where a kind has no number."""
        return max(math.inf if math.isnan(loss.nll) else loss.nll for loss in self.losses.values())

    def describe(self) -> str:
        heads = "all heads" if self.method.heads == "all" else f"heads {', '.join(map(str, self.method.heads or ()))}"
        return f"layer {self.method.layer}, {heads}, {self.method.keep} tokens"


# seconds of a whole prompt with a method, and without: predicted
Predict = Callable[[TokenSelect], tuple[float, float]]


@dataclass
class Search:
    """Runs what is asked, on a model and a text.

    options: of `sparsify.compile`; methods that they name act beside, in what it is compared with too.
    progress: called with (done, of how many at most, what runs now).
    points: what was run.
    """

    model: nn.Module
    ids: Tensor
    asked: Asked
    options: Mapping[str, Any]
    predict: Predict
    progress: Callable[[int, int, str], None] = lambda done, all_, what: None
    points: list[Point] = field(default_factory=list)
    _done: int = 0

    def run(self) -> Point:
        """The point that takes the least time of those within the budget.

        Raises:
            UnsupportedError: no layer's choice keeps the answers, or heads cannot be measured, or a prompt cannot be narrowed.
        """
        pieces = cut(self.ids, self.asked.length, self.asked.count, cue=self.asked.cue, answer=self.asked.answer, seed=self.asked.seed)
        prompts = [piece.prompt for piece in pieces]
        looked = looks(
            self.model, prompts, self.options, self.asked.method.queries, lambda: self._tick(pieces, 0, "attention of all layers")
        )
        layers = looked[0].shape[0]
        with losses.compiled(self.model, None, self.options):
            dense = losses.answers(self.model, pieces, lambda: self._tick(pieces, layers, "dense answers"))
        for keep in self.asked.keeps:
            self._earliest(keep, pieces, looked, dense)
        if not self.points:
            raise UnsupportedError("no head of any layer looks at what later layers look at", hint="name heads: -o token_select.heads=…")
        within = [point for point in self.points if point.loss <= self.asked.budget]
        if not within:
            best = min(self.points, key=lambda point: point.loss)
            what = f"no choice loses as little as {self.asked.budget} nats a token: the least is {best.loss:.4f}, {best.describe()}"
            raise UnsupportedError(what, hint="a larger --keep-error, or more tokens by --keep")
        return min(within, key=lambda point: (point.seconds, point.loss))

    def _earliest(self, keep: int, pieces: Sequence[Piece], looked: Sequence[Tensor], dense: Answers) -> None:
        """Halves the layers until the earliest one within the budget is left. Later layers know more, but not always: what counts is
        only what was run. Where heads have to be found, layers that were not measured, such as those with a window, are passed over."""
        found = self.asked.method.heads is not None
        layers = [layer for layer in range(looked[0].shape[0] - 1) if found or not any(bool(look[layer].isnan().any()) for look in looked)]
        low, high = 0, len(layers) - 1
        if not layers or not self._within(layers[high], keep, pieces, looked, dense):
            return
        while low < high:
            middle = (low + high) // 2
            if self._within(layers[middle], keep, pieces, looked, dense):
                high = middle
            else:
                low = middle + 1

    def _within(self, layer: int, keep: int, pieces: Sequence[Piece], looked: Sequence[Tensor], dense: Answers) -> bool:
        method = self.asked.method.model_copy(update={"layer": layer, "keep": keep, "mass": None})
        heads, held = (method.heads, 0.0) if method.heads is not None else choose_heads(looked, layer, method)
        if not heads:
            return False
        method = method.model_copy(update={"heads": heads})
        what = f"{keep} tokens behind layer {layer}"
        with losses.compiled(self.model, method, self.options):
            found = losses.answers(self.model, pieces, lambda: self._tick(pieces, looked[0].shape[0], what))
        self.points.append(Point(method, losses.compare(pieces, dense, found), held, *self.predict(method)))
        return self.points[-1].loss <= self.asked.budget

    def _tick(self, pieces: Sequence[Piece], layers: int, what: str) -> None:
        self._done += 1
        steps = 2 + len(self.asked.keeps) * (1 + max(1, layers).bit_length())
        self.progress(self._done, len(pieces) * steps, what)


def make_plan(search: Search, point: Point, at: int, target: str) -> Plan:
    """The plan that `options={"plan": ...}` loads: every site of one prompt as the options say, and the choice behind its layer.

    Args:
        at: tokens that seconds were predicted for. target: the device's name.
    """
    asked = search.asked
    with losses.compiled(search.model, point.method, search.options) as model:
        options = losses.options_with(point.method, search.options)
        plan = sparsify.explain(model, options=options, input_ids=search.ids[:, : asked.length], use_cache=False)
    for decision in plan.decisions:
        if decision.kind == "stream":
            decision.error = point.loss
            decision.reason = f"calibrated: {decision.reason}"
    plan.provenance = provenance_of(search.model, measured=True)
    plan.calibration = Calibration(
        text=hashlib.sha256(search.ids.cpu().numpy().tobytes()).hexdigest(),
        settings=asked.digest(),
        lengths=[asked.length],
        pieces=[asked.count],
        seed=asked.seed,
        budget={"keep_error": asked.budget},
        at=at,
        target=target,
        seconds=point.seconds,
        dense_seconds=point.dense_seconds,
        density=1.0,
        errors={str(asked.length): point.loss},
        gap=0.0,
    )
    return plan
