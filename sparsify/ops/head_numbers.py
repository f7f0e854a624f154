"""`sparsify::head_numbers`: marks a tensor of a captured graph as numbers of an attention's heads, such as thresholds.

A graph that serves several layers takes as operands what they differ in. Whoever calls it marks these operands; a method that rewrites the
site reads them there (`Editor.head_numbers`). The op computes nothing, and lowering drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.library import NAMESPACE, library

library.define("head_numbers(Tensor numbers, str site, str option) -> ()")


def _nothing(numbers: Tensor, site: str, option: str) -> None:
    return None


library.impl("head_numbers", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::head_numbers", _nothing, lib=library)
head_numbers = torch.ops.sparsify.head_numbers.default
