"""`sparsify::small_sum`: the sum over the processes of a group of a part that each of them has, of a few kilobytes."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import define

# Compiled graphs are cached by op name and constants: raise this when semantics change.
VERSION = 1


@dataclass(frozen=True, eq=False)
class SmallSumCall(OpCall):
    """One call of `sparsify::small_sum`. Every process of the group makes it, in the same order.

    part: [batch, tokens, width], floating point: this process's.
    group: the group's name.
    """

    NAME: ClassVar[str] = "small_sum"
    VERSION: ClassVar[int] = VERSION

    part: Annotated[Tensor, Operand("batch tokens width")]
    _: KW_ONLY
    group: str

    def empty_sum(self) -> Tensor:
        """An uninitialised result, [batch, tokens, width]."""
        return self.part.new_empty(self.part.shape)


small_sum = define(SmallSumCall, SmallSumCall.empty_sum, "Tensor")
