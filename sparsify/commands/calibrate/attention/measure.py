"""What every setting would lose and visit at one attention site, head by head, from the dense model's own operands.

The ops that a compiled model runs are run here, dense and with each setting. Both give the log of each row's sum of exponentials, so that
the softmax mass that a row loses is 1 - exp(lse' - lse), and no matrix of scores is ever held: memory is O(tokens · head_dim).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention.settings import Grid
from sparsify.ops import block_lists
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
    error: float64 [settings, heads], ‖o' - o‖²; NaN where a setting was not tried (a window that is longer than the prompt).
    lost: float64 [settings, heads], softmax mass that rows lose, summed.
    classes: int64 [settings, heads, classes], rows by the mass that they lose, see `EDGES`.
    visited: float64 [settings, heads], key blocks visited, summed over query blocks.
    possible: causal blocks, of one head.
    rows: rows of one head.
    """

    norm: Tensor
    error: Tensor
    lost: Tensor
    classes: Tensor
    visited: Tensor
    possible: float = 0.0
    rows: int = 0
    pieces: int = field(default=0)

    @classmethod
    def empty(cls, settings: int, heads: int) -> Record:
        make = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        classes = torch.zeros(settings, heads, len(EDGES) + 1, dtype=torch.int64)
        return cls(make(heads), make(settings, heads), make(settings, heads), classes, make(settings, heads))

    def add(self, other: Record) -> None:
        """Adds what another piece of the same length measured."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

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
def measure(query: Tensor, key: Tensor, value: Tensor, scale: float, grid: Grid, last: int = 0) -> Record:
    """Tries the grid on one causal attention of a whole prompt.

    Args:
        query: [1, query_heads, tokens, head_dim]. key, value: [1, kv_heads, tokens, head_dim].
        scale: of the logits.
        last: so many rows at the end weigh as much in norm and error as all others together; 0: every row weighs the same.
    """
    heads, length = query.shape[1:3]
    block = grid.block
    record = Record.empty(len(grid.settings), heads)
    fixed: dict[str, Any] = {"scale": scale, "causal": True}
    exact, lse = AttentionCall(query, key, value, **fixed).run()
    record.norm += _squares(exact, last=last)
    record.possible, record.rows, record.pieces = possible_blocks(length, block), length, 1
    edges = torch.tensor(EDGES, device=query.device)
    for index, setting in enumerate(grid.settings):
        if setting.family is None:
            window = int(setting.value)
            if window + grid.sinks >= length:
                record.error[index] = torch.nan
                continue
            found = AttentionCall(query, key, value, **fixed, windows=(window,), sinks=grid.sinks).run()
            record.visited[index] = window_blocks(length, window, block)
        else:
            counts, indices = grid.families[setting.family].call(query, key, scale, setting.value).run()
            found = AttentionCall(query, key, value, **fixed, block_counts=counts, block_indices=indices, block_size=block).run()
            share = block_lists.density(counts, length, length, 0, block)[0][0]
            record.visited[index] = share.cpu() * record.possible
            del counts, indices
        record.error[index] = _squares(found[0], exact, last)
        lost = (1 - (found[1] - lse).double().exp()).clamp(0, 1)[0]
        record.lost[index] = lost.sum(-1).cpu()
        classes = torch.bucketize(lost.float(), edges)
        flat = classes + torch.arange(heads, device=classes.device)[:, None] * (len(EDGES) + 1)
        record.classes[index] = flat.flatten().bincount(minlength=heads * (len(EDGES) + 1)).view(heads, -1).cpu()
    return record


def possible_blocks(length: int, block: int) -> float:
    """Causal blocks of a prompt."""
    rows = cdiv(length, block)
    return rows * (rows + 1) / 2


def window_blocks(length: int, window: int, block: int) -> float:
    """Of those, the blocks that hold a window's keys or are the first."""
    rows = torch.arange(cdiv(length, block), dtype=torch.float64)
    first = ((rows * block - window + 1) / block).floor().clamp(min=0)
    return float((rows - first + 1 + (first > 0)).sum())


def _squares(first: Tensor, second: Tensor | None = None, last: int = 0) -> Tensor:
    """float64 [heads]: the sum of squares of [1, heads, tokens, dim], or of its difference from a second one; `last` rows weigh as much as
    all others."""
    total = torch.zeros(first.shape[1], dtype=torch.float64, device=first.device)
    tokens, step = first.shape[2], max(1, _CHUNK // (first.shape[1] * first.shape[3]))
    bounds = [*range(0, tokens - last, step), *range(tokens - last, tokens, step), tokens]
    for begin, end in itertools.pairwise(bounds):
        part = first[0, :, begin:end].float()
        if second is not None:
            part = part - second[0, :, begin:end].float()
        weight = (tokens - last) / last if last and begin >= tokens - last else 1.0
        total += weight * part.square().sum((1, 2), dtype=torch.float64)
    return total.cpu()
