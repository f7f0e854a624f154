"""`sparsify::head_numbers`: marks a tensor of a captured graph as numbers of an attention's heads, such as thresholds.

A graph that serves several layers takes as operands what they differ in. Whoever calls it marks these operands; a method that rewrites the
site reads them there (`Editor.head_numbers`). The op computes nothing, and lowering drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.graph.typed_torch import define_op, register_fake, register_kernel
from sparsify.ops.library import NAMESPACE, library

define_op(library, "head_numbers(Tensor numbers, str site, str option) -> ()")


def _nothing(numbers: Tensor, site: str, option: str) -> None:
    return None


register_kernel(library, "head_numbers", _nothing, "CompositeExplicitAutograd")
register_fake(library, f"{NAMESPACE}::head_numbers", _nothing)
head_numbers = torch.ops.sparsify.head_numbers.default
