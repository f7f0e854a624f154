"""Whether two ways to compute a layer give the same, as far as rounding lets it be told."""

from __future__ import annotations

import torch
from torch import Tensor

# how far results may differ, as a share of what the layer adds
_CLOSE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def alike(before: Tensor, want: Tensor, found: Tensor) -> bool:
    """Compares the residual stream behind a layer in two ways. Reads the device: synchronises.

    Args:
        before: the stream that the layer was given, of the same shape.
    """
    dtype, (before, want, found) = before.dtype, (one.double() for one in (before, want, found))
    allowed = _CLOSE.get(dtype, 1e-3) * (want - before).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
    return bool((want - found).abs().max() <= allowed)
