"""What policies share that turn queries or keys back by their positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def angles_on(like: Tensor, frequencies: Sequence[float]) -> Tensor:
    """The angle per position of each rotated pair, fp64 [pairs] on `like`'s device."""
    # by fills, since a copy from the host cannot be part of a CUDA graph
    return torch.stack([like.new_full((), angle, dtype=torch.float64) for angle in frequencies])


class Rotation:
    """A rotary embedding's turn of the first dimensions, in half-split layout, or the average of several."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin

    @classmethod
    def by(cls, steps: Tensor, angles: Tensor) -> Rotation:
        """By `steps` [batch, n] positions; fp32 angles lose the fraction of the turn after some 100 000 of them."""
        turned = steps.double()[:, None, :, None] * angles
        return cls(turned.cos().float(), turned.sin().float())

    def mean(self) -> Rotation:
        return Rotation(self.cos.mean(2, keepdim=True), self.sin.mean(2, keepdim=True))

    def turn(self, rows: Tensor) -> Tensor:
        """Of rows [batch, heads, n, head_dim]."""
        half = self.cos.shape[-1]
        a, b, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin, rest), -1)
