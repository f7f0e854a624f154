"""divprune: before the first layer only image tokens go on that lie far from each other.

DivPrune (arXiv 2503.02175, algorithm 1): of a row's image tokens a subset whose smallest cosine distance between two of them is large,
found greedily: first the token whose nearest other one is furthest, then again and again the one that is furthest from all that were taken.
No question is asked of the text, so that what goes on serves every later one alike.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.ops.farthest import FarthestFirstCall
from sparsify.planning.method import Context, ImagePass, ImageRows, StreamSite

_STEP = 1  # launches' time for each token that is taken


class DivPrune(ImagePass):
    name: ClassVar[str] = "divprune"
    layer: ClassVar[int] = -1
    queries: ClassVar[int] = 0

    def rank(self, rows: ImageRows) -> Tensor:
        """Tokens in the order in which they are taken, the first one highest; 0 for those that are not."""
        count = rows.is_image.sum(-1)
        most, steps = (int(n) for n in torch.stack((count.max(), (rows.kept - (rows.is_token & ~rows.is_image).sum(-1)).max())).tolist())
        steps = min(most, steps)
        columns = rows.is_image.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        far = _distances(rows.hidden.gather(1, columns[:, :, None].expand(-1, -1, rows.hidden.shape[2])))
        picks = FarthestFirstCall(far, count, steps=steps).run()
        falling = torch.arange(steps, 0, -1, device=far.device, dtype=torch.float32) * (picks >= 0)
        score = far.new_zeros(far.shape[:2]).scatter_reduce_(1, picks.clamp(min=0), falling, "amax")
        return torch.zeros_like(rows.is_image, dtype=torch.float32).scatter_(1, columns, score)

    def ranking_seconds(self, site: StreamSite, context: Context) -> float:
        images = max(images for _, images in site.rows)
        flops = 2 * site.batch * images**2 * site.hidden
        taken = self.most(site.rows) - min(tokens - images for tokens, images in site.rows)
        return flops / context.device.matrix_flops(torch.float32) + _STEP * taken * context.device.launch


def _distances(rows: Tensor) -> Tensor:
    """Cosine distances, fp32 [batch, tokens, tokens], of rows [batch, tokens, width]."""
    unit = F.normalize(rows.to(torch.float32), dim=-1)
    return 1 - unit @ unit.mT
