"""What every setting would lose and visit at one attention site, head by head, from the dense model's own operands.

The ops that a compiled model runs are run here, dense and with each setting. Both give the log of each row's sum of exponentials, so that
the softmax mass that a row loses is 1 - exp(lse' - lse), and no matrix of scores is ever held: memory is O(tokens · head_dim).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention.settings import Grid
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv

# Upper edges of the classes that rows are counted in by the mass that they lose; the first class loses at most 0.01 %.
EDGES = tuple(10 ** (-4 + i / 10) for i in range(41))
WORST = 0.99  # share of the rows that lose at most what is called the worst row's loss
_CHUNK = 1 << 25  # elements that are compared at once


@dataclass
class Record:
    """Sums over rows and pieces of one length at one site. Settings in the grid's order.

    norm: float64 [heads], ‖o‖² of the dense output; of this and of the error rows may be weighed, see `measure`.
    error: float64 [settings, heads], ‖o' - o‖²; NaN where a setting was not tried (a window that is longer than the prompt, blocks
        that are nearly all).
    lost: float64 [settings, heads], softmax mass that rows lose, summed.
    classes: int64 [settings, heads, classes], rows by the mass that they lose, see `EDGES`.
    visited: float64 [settings, heads], key blocks visited, summed over query blocks.
    possible: causal blocks, of one head.
    rows: rows of one head.
    divergence: float64 [settings, heads], nats, what each head alone is predicted to change of the text's predictions, see `measure`; None
        where no gradients were followed.
    """

    norm: Tensor
    error: Tensor
    lost: Tensor
    classes: Tensor
    visited: Tensor
    possible: float = 0.0
    rows: int = 0
    pieces: int = field(default=0)
    divergence: Tensor | None = None

    @classmethod
    def empty(cls, settings: int, heads: int) -> Record:
        make = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        classes = torch.zeros(settings, heads, len(EDGES) + 1, dtype=torch.int64)
        return cls(make(heads), make(settings, heads), make(settings, heads), classes, make(settings, heads))

    def add(self, other: Record) -> None:
        """Adds what another piece of the same length measured."""
        for name, own in vars(self).items():
            setattr(self, name, None if own is None else own + getattr(other, name))

    @property
    def density(self) -> Tensor:
        """[settings, heads]: share of causal blocks visited."""
        return self.visited / self.possible

    @property
    def relative_error(self) -> Tensor:
        """[settings, heads]: ‖o' - o‖ / ‖o‖ of each head."""
        return (self.error / self.norm.clamp(min=1e-300)).sqrt()

    @property
    def mean_lost(self) -> Tensor:
        """[settings, heads]: mass that the mean row loses."""
        return self.lost / self.rows

    def worst_lost(self, share: float = WORST) -> Tensor:
        """[settings, heads]: mass that `share` of the rows lose at most, to a tenth of a decade."""
        within = self.classes.cumsum(-1) >= share * self.classes.sum(-1, keepdim=True)
        return torch.tensor([0.0, *EDGES[1:], 1.0], dtype=torch.float64)[within.int().argmax(-1)]

    def lost_beyond(self, mass: float) -> Tensor:
        """[settings, heads]: share of rows that lose more than so much."""
        first = sum(edge < mass * 0.999 for edge in EDGES) + 1
        return self.classes[..., first:].sum(-1).double() / self.rows


@torch.no_grad()
def measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    grid: Grid,
    last: int = 0,
    gradient: Tensor | None = None,
    most: float | None = None,
) -> Record:
    """Tries the grid on one causal attention of a whole prompt.

    Args:
        query: [1, query_heads, tokens, head_dim]. key, value: [1, kv_heads, tokens, head_dim].
        scale: of the logits.
        last: so many rows at the end weigh as much in norm and error as all others together; 0: every row weighs the same.
        gradient: as the output, of the text's predictions (`gradients.Predictions`): the divergence is ½ Σ rows (gradient · (o' - o))².
        most: settings with which every head visits a larger share of the blocks are not tried; None: all are.
    """
    length, block = query.shape[2], grid.block
    fixed: dict[str, Any] = {"scale": scale, "causal": True}
    exact, lse = AttentionCall(query, key, value, **fixed).run()
    sums = _Sums(exact, lse, last, gradient, len(grid.settings))
    for index, setting in enumerate(grid.settings):
        if setting.family is None:
            window = int(setting.value)
            density = torch.full_like(sums.density[index], window_blocks(length, window, block) / possible_blocks(length, block))
            if window + grid.sinks >= length:
                sums.leave_out(index, density)
                continue
            found = AttentionCall(query, key, value, **fixed, windows=(window,), sinks=grid.sinks).run()
        else:
            counts, indices = grid.families[setting.family].call(query, key, scale, setting.value).run()
            density = counts[0].sum(-1).double() / possible_blocks(length, block)
            if most is not None and float(density.min()) > most:
                sums.leave_out(index, density)
                continue
            found = AttentionCall(query, key, value, **fixed, block_counts=counts, block_indices=indices, block_size=block).run()
            del counts, indices
        sums.add(index, found[0], found[1], density)
    return sums.record(possible_blocks(length, block))


class _Sums:
    """What `Record` holds of one piece, on the device until all is known: nothing waits for it in between."""

    def __init__(self, exact: Tensor, lse: Tensor, last: int, gradient: Tensor | None, settings: int):
        self.exact, self.lse, self.last, self.gradient = exact, lse, last, gradient
        heads = exact.shape[1]
        make = lambda *shape, **more: torch.zeros(*shape, device=exact.device, **{"dtype": torch.float64, **more})
        self.error, self.divergence, self.lost = (make(settings, heads) for _ in range(3))
        self.density = make(settings, heads)
        self.classes = make(settings, heads, len(EDGES) + 1, dtype=torch.int64)
        self.edges = torch.tensor(EDGES, device=exact.device)
        self.norm = _over_rows(lambda rows: exact[0, :, rows].float().square().sum(-1), exact, last)

    def leave_out(self, index: int, density: Tensor) -> None:
        """A setting that is not tried."""
        self.density[index] = density
        self.error[index] = self.divergence[index] = torch.nan

    def add(self, index: int, output: Tensor, lse: Tensor, density: Tensor) -> None:
        """What a setting gives: as the attention op does, and float64 [heads], share of the causal blocks."""
        self.density[index] = density
        change = lambda rows: output[0, :, rows].float() - self.exact[0, :, rows].float()
        squares = lambda rows: change(rows).square().sum(-1)
        if self.gradient is None:
            self.error[index] = _over_rows(squares, output, self.last)
        else:
            gradient = self.gradient

            def both(rows: slice) -> Tensor:
                changed = change(rows)
                along = (changed * gradient[0, :, rows].float()).sum(-1)
                return torch.stack([changed.square().sum(-1), along.square()])

            self.error[index], self.divergence[index] = _over_rows(both, output, (self.last, 0))
            self.divergence[index] /= 2
        lost = (1 - (lse - self.lse).double().exp()).clamp(0, 1)[0]
        self.lost[index] = lost.sum(-1)
        classes = torch.bucketize(lost.float(), self.edges)
        self.classes[index].scatter_add_(1, classes, torch.ones_like(classes))

    def record(self, possible: float) -> Record:
        norm, error, lost, density, classes = (one.cpu() for one in (self.norm, self.error, self.lost, self.density, self.classes))
        divergence = None if self.gradient is None else self.divergence.cpu()
        return Record(norm, error, lost, classes, density * possible, possible, self.exact.shape[2], 1, divergence)


def possible_blocks(length: int, block: int) -> float:
    """Causal blocks of a prompt."""
    rows = cdiv(length, block)
    return rows * (rows + 1) / 2


def window_blocks(length: int, window: int, block: int) -> float:
    """Of those, the blocks that hold a window's keys or are the first."""
    rows = torch.arange(cdiv(length, block), dtype=torch.float64)
    first = ((rows * block - window + 1) / block).floor().clamp(min=0)
    return float((rows - first + 1 + (first > 0)).sum())


def _over_rows(of: Callable[[slice], Tensor], like: Tensor, last: int | tuple[int, ...]) -> Tensor:
    """Sums over rows.

    Args:
        of: fp32 [heads, rows] of some rows; with several `last` [sums, heads, rows].
        like: [1, heads, tokens, dim]. last: so many rows at the end weigh as much as all others.

    Returns:
        float64 [heads] or [sums, heads].
    """
    tokens, step = like.shape[2], max(1, _CHUNK // (like.shape[1] * like.shape[3]))
    ends = (last,) if isinstance(last, int) else last
    bounds = sorted({*range(0, tokens, step), *(tokens - end for end in ends), tokens})
    total: Tensor | None = None
    for begin, end in itertools.pairwise(bounds):
        weights = [(tokens - one) / one if one and begin >= tokens - one else 1.0 for one in ends]
        part = of(slice(begin, end)).sum(-1, dtype=torch.float64)
        if any(weight != 1 for weight in weights):
            part = part * (weights[0] if isinstance(last, int) else torch.tensor(weights, device=part.device)[:, None])
        total = part if total is None else total + part
    assert total is not None
    return total
