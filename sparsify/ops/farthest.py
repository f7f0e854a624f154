"""`sparsify::farthest_first`: few tokens that lie far from each other, taken one after the other.

Farthest-first traversal (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985), which DivPrune (arXiv 2503.02175,
algorithm 1) begins with the token whose nearest other one is furthest.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import define

# Compiled graphs are cached by op name and constants: raise this when semantics change.
VERSION = 1


@dataclass(frozen=True, eq=False)
class FarthestFirstCall(OpCall):
    """One call of `sparsify::farthest_first`.

    distances: fp32 [batch, tokens, tokens], symmetric; what the diagonal holds is not read.
    counts: integers [batch]: how many tokens a row has; they come first, and what lies behind them is not read.
    steps: tokens to take of each row, at most `tokens`.
    """

    NAME: ClassVar[str] = "farthest_first"
    VERSION: ClassVar[int] = VERSION

    distances: Annotated[Tensor, Operand("batch tokens tokens")]
    counts: Annotated[Tensor, Operand("batch", "integers")]
    _: KW_ONLY
    steps: int

    @property
    def tokens(self) -> int:
        return self.distances.shape[1]

    def check(self) -> None:
        """Checks that the arguments fit together.

        Raises:
            UnsupportedError: says what is wrong.
        """
        super().check()
        self.need(self.distances.dtype == torch.float32, f"distances of {self.distances.dtype}", "float32")
        self.need(0 <= self.steps <= self.tokens, f"{self.steps} of {self.tokens} tokens", "as many at most")

    def empty_picks(self) -> Tensor:
        """Uninitialised: int64 [batch, steps], a row's tokens in the order in which they are taken, -1 once all are."""
        return self.counts.new_empty(self.counts.shape[0], self.steps, dtype=torch.int64)


farthest_first = define(FarthestFirstCall, FarthestFirstCall.empty_picks, "Tensor")
