"""Densities at lengths that were not measured: a power of the length for each head and setting, through what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention.measure import Record, possible_blocks, window_blocks
from sparsify.commands.calibrate.attention.settings import Grid


@dataclass(frozen=True)
class Densities:
    """density(N) = at_longest · (longest / N) ** power, at most 1, and at least the forced blocks.

    at_longest, power: float64 [settings, heads].
    """

    grid: Grid
    block: int
    longest: int
    at_longest: Tensor
    power: Tensor

    @classmethod
    def fit(cls, grid: Grid, records: Mapping[int, Record]) -> Densities:
        """Least squares on logarithms, through the longest length's own density. Powers lie between 0 and 1: a row visits neither fewer
        blocks when it is longer, nor a larger share of them."""
        block = grid.block
        longest = max(records)
        anchor = records[longest].density
        steps = [(length, record.density) for length, record in records.items() if length != longest]
        if not steps:
            falls = [0.0 if setting.family is None else grid.families[setting.family].falls for setting in grid.settings]
            return cls(grid, block, longest, anchor, torch.tensor(falls, dtype=torch.float64)[:, None].expand_as(anchor))
        x = torch.tensor([longest / length for length, _ in steps], dtype=torch.float64).log()
        y = torch.stack([(density / anchor.clamp(min=1e-12)).clamp(min=1e-12).log() for _, density in steps])
        power = (x[:, None, None] * y).sum(0) / x.square().sum()
        return cls(grid, block, longest, anchor, power.clamp(0, 1))

    def at(self, length: int) -> Tensor:
        """[settings, heads] at a length; windows are counted, not fitted."""
        found = self.at_longest * (self.longest / length) ** self.power
        possible = possible_blocks(length, self.block)
        rows = -(-length // self.block)
        found = found.clamp(min=min(1.0, (2 * rows - 1) / possible), max=1.0)
        for index, setting in enumerate(self.grid.settings):
            if setting.family is None:
                found[index] = window_blocks(length, int(setting.value), self.block) / possible
        return found
