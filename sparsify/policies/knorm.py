"""knorm: tokens whose keys are short.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparsify.policies.base import Candidates
from sparsify.policies.scored import KeyPolicy


class Knorm(KeyPolicy):
    """Tokens whose keys have the smallest L2 norm stay, chosen per KV head, and the last ones. Reads no queries."""

    name: ClassVar[str] = "knorm"

    def score(self, candidates: Candidates) -> Tensor:
        return -candidates.keys.float().norm(dim=-1)
