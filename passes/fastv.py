"""fastv: behind an early layer only those image tokens of a prompt go on that its last tokens attend to most.

FastV (arXiv 2403.06764, section 4.1): the attention of the layer, as a mean over its heads, ranks the image tokens; the lowest are left out
of all later layers. The paper ranks behind the second layer, by the last token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsify.planning.method import ImagePass, ImageRows


class FastV(ImagePass):
    name: ClassVar[str] = "fastv"

    layer: int = Field(1, ge=0, description="decoder layer whose attention ranks, from 0; those behind it compute the tokens that go on")
    queries: int = Field(1, ge=1, le=4096, description="last tokens of each row whose attention ranks")

    def rank(self, rows: ImageRows) -> Tensor:
        if rows.mass is None:
            raise ValueError("no attention was observed")
        return rows.mass.to(torch.float32).mean(1)
