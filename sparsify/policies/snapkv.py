"""snapkv: what the prompt's last queries look at.

Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation", arXiv 2404.14469, listing 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from sparsify.policies.base import Candidates
from sparsify.policies.scored import ScoredPolicy, attention_mass


class SnapKV(ScoredPolicy):
    """What the last queries of a prompt look at stays, and they themselves.

    Prompts are attended in full and cut down once at the end of every call with more than one token.

    window: last queries whose attention scores the keys; their own tokens stay.
    pool: smoothing of the scores along the keys, "avg" or "max".
    kernel: keys that the smoothing spans, odd; None: 5 for "avg", 7 for "max".
    group: how the query heads of one KV head agree.
    """

    name: ClassVar[str] = "snapkv"

    window: int = Field(32, ge=1, le=4096, description="last queries that score, in tokens")
    pool: Literal["avg", "max"] = Field("avg", description="smoothing of the scores along the keys")
    kernel: int | None = Field(None, ge=1, le=255, description="keys that the smoothing spans, odd; None: 5 for avg, 7 for max")
    group: Literal["mean", "max"] = Field("mean", description="how the query heads of one KV head agree")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError("must be odd")
        return value

    @property
    def observed(self) -> int:
        return self.window

    @property
    def newest(self) -> int:
        return self.window

    def score(self, candidates: Candidates) -> Tensor:
        mass, at = attention_mass(candidates), candidates.positions
        batch, kv_heads, count = at.shape
        own = at > (candidates.newest - self.window)[:, None, None]
        # the window's own keys stay anyway and must not smear into their neighbours
        mass = mass.view(batch, kv_heads, -1, count).masked_fill(own[:, :, None], 0)
        mass = self._smooth(mass.flatten(0, 1)).view(mass.shape)
        return mass.mean(2) if self.group == "mean" else mass.amax(2)

    def _smooth(self, mass: Tensor) -> Tensor:
        width = self.kernel or (5 if self.pool == "avg" else 7)
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(mass, width, stride=1, padding=width // 2)
