"""How much predictions really change by a choice, by running it, and the choice that keeps a bound on that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import backends
from sparsify.commands.calibrate.attention.capture import Capture, Captured
from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Choice, Chosen
from sparsify.commands.calibrate.attention.make_plan import method_of
from sparsify.commands.calibrate.attention.run import Asked, methods_of, settings_for
from sparsify.commands.calibrate.attention.settings import Grid
from sparsify.ops.attention import AttentionCall
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.selection import SelectCall
from sparsify.passes.minference import MInference
from sparsify.planning.config import config
from sparsify.planning.decision import Place
from sparsify.planning.registry import discover

RUNS = 7  # of a choice, at most
_STEP = 4.0  # by which the predicted loss that is tried changes until what was run lies on both sides of the bound
_ROWS = 1024  # of logits that are compared at once


class Losses:
    """Runs choices over a text's prompts of the longest length, beside dense attention.

    Args:
        ids: int64 [1, tokens]. options: of torch.compile.
    """

    def __init__(self, model: nn.Module, ids: Tensor, asked: Asked, options: dict[str, Any]):
        self._model, self._ids, self._asked = model, ids, asked
        self._settings = settings_for(options)
        length = max(asked.lengths)
        self._pieces = [ids[:, at : at + length] for at in asked.offsets(ids.shape[1], length)]

    @torch.no_grad()
    def lost(self, choice: Choice) -> float:
        """The mean over tokens of KL(dense prediction ‖ the choice's), nats: what text that the dense model would write loses of its
        likelihood. Of the last tokens, where these weigh more, if they lose more."""
        by_place = {one.layer.site.place: one for one in choice.layers}
        serving: dict[Place, Chosen] = {}

        def serve(site: Captured, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
            return output(serving[site.place], self._asked.grid, query, key, value) if serving else None

        capture, found = Capture(self._model, self._settings, serve, methods_of(self._asked.grid), every_row=True), []
        with capture.running() as forward, backends.serving(self._settings.kernels):
            for piece in self._pieces:
                serving.clear()
                dense = forward(piece)
                serving.update(by_place)
                found.append(divergence(dense[0], forward(piece)[0]))
        lost = torch.stack(found)
        last = lost[:, -self._asked.last :] if self._asked.last else lost
        return max(float(lost.mean()), float(last.mean()))


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """float64 [rows]: KL(p ‖ p') of the softmax of two tensors of logits [rows, vocabulary]."""
    parts = zip(dense.split(_ROWS), other.split(_ROWS), strict=True)
    each = [F.kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="none").sum(-1) for p, q in parts]
    return torch.cat(each).double().cpu()


def output(chosen: Chosen, grid: Grid, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """What a layer's attention gives as it was chosen; None: what dense attention gives. Shapes as of `measure`."""
    name, options = method_of(chosen, grid)
    fixed: dict[str, Any] = {"scale": chosen.layer.site.scale, "causal": True}
    if name == "dense":
        return None
    if name == "sink_window":
        windows = tuple(query.shape[2] if s == DENSE else int(s.value) for s in chosen.settings)
        return AttentionCall(query, key, value, **fixed, windows=windows, sinks=grid.sinks).run()[0]
    method: Any = config.validate(discover()[name], options, "plan", name)
    if isinstance(method, MInference):
        call, seen = SelectPatternCall(query, key, scale=fixed["scale"], **method.selection()), {}
    else:
        call = SelectCall(query, key, **fixed, **method.selection(), windows=method.windows)
        seen = {"windows": method.windows, "sinks": method.sinks} if method.windows else {}
    counts, indices = call.run()
    lists: dict[str, Any] = {"block_counts": counts, "block_indices": indices, "block_size": method.block}
    return AttentionCall(query, key, value, **fixed, **lists, **seen).run()[0]


def keep(
    bound: float, choose: Callable[[Budget], tuple[Choice, str]], lost: Callable[[Choice], float], runs: int = RUNS
) -> tuple[Choice, str, float]:
    """The choice that is predicted to take the least time, of those that were run and lost no more than the bound. What is tried follows
    from predictions: more predicted loss is taken to mean more loss, and how much is found by bisection.

    Args:
        bound: nats a token. choose: the best choice within a budget of the kind `keep_loss`, and a note.
        lost: nats a token of a choice.

    Returns:
        the choice with its note, and what it lost; the dense one where none keeps the bound.
    """
    best: tuple[Choice, str, float] | None = None
    below, above = 0.0, float("inf")
    tried = bound
    for _ in range(runs if bound > 0 else 0):
        choice, note = choose(Budget("keep_loss", tried))
        found = lost(choice)
        if found <= bound:
            below = tried
            if best is None or choice.seconds < best[0].seconds:
                best = choice, note, found
        else:
            above = tried
        tried = tried / _STEP if below == 0 else tried * _STEP if above == float("inf") else (below * above) ** 0.5
    return best or (*choose(Budget("keep_loss", 0.0)), 0.0)
