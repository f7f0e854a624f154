"""tova: what the last query looks at, one choice for all heads of a layer.

Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104, section 4.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparsify.policies.base import Candidates
from sparsify.policies.scored import ScoredPolicy, attention_mass


class TOVA(ScoredPolicy):
    """Tokens that the last query of a call attends to most, on the average of all query heads, stay.

    The paper drops one token a step by that step's query, as a cache with `every=1` does. Otherwise a prompt's last query cuts the prompt
    down at once, and later tokens replace the worst-scored ones.
    """

    name: ClassVar[str] = "tova"

    @property
    def observed(self) -> int:
        return 1

    @property
    def newest(self) -> int:
        return 1

    def score(self, candidates: Candidates) -> Tensor:
        return attention_mass(candidates).mean(1, keepdim=True).expand(candidates.positions.shape)
