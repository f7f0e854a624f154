"""keydiff: tokens whose keys differ most from the others'.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
arXiv 2504.15364, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sparsify.policies.base import Candidates
from sparsify.policies.scored import KeyPolicy


class KeyDiff(KeyPolicy):
    """Tokens whose keys are least similar to the mean direction of all keys stay, chosen per KV head, and the last ones.

    Reads no queries.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, candidates: Candidates) -> Tensor:
        # what is no token has any key, NaN among them
        directions = F.normalize(candidates.keys.float(), dim=-1).masked_fill((candidates.positions < 0)[..., None], 0)
        # the anchor is the mean direction; cosines do not depend on its length
        anchor = F.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)
