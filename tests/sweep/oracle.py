"""Sinks and a window forced on a model's eager attention from outside, wherever a prompt's attention is plainly causal.

Where it is something else (a window of its own, chunks, chosen keys), it is left as it is, as the method leaves it: so many are changed as
must be rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.support.harness import sink_window_mask
from tests.sweep.seen import LOGSUMEXP, SOFTMAX

SINKS, WINDOW = 4, 32
_HIDDEN = -1e30  # masks fill with −inf or the lowest number of the dtype, scores are small


class SinkWindow(TorchFunctionMode):
    """While it is active, causal attentions over more than sinks and window see those alone; `changed` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if function in SOFTMAX:
            scores, *rest = args if args else (kwargs.pop("input"),)
            return function(self._hidden(scores), *rest, **kwargs)
        if function in LOGSUMEXP:  # beside a softmax it scales the output by what the same scores make of a sink
            scores, *rest = args if args else (kwargs.pop("input"),)
            changed, hidden = self.changed, self._hidden(scores)
            self.changed = changed
            return function(hidden, *rest, **kwargs)
        return function(*args, **kwargs)

    def _hidden(self, scores: Tensor) -> Tensor:
        """Scores before a softmax. A last column may be sink logits, which stay."""
        rows, added = scores.shape[-2] if scores.dim() >= 2 else 0, 0
        if scores.dim() in (3, 4) and scores.shape[-1] == rows + 1:
            added = 1
        elif scores.dim() not in (3, 4) or scores.shape[-1] != rows:
            return scores
        kept = self._kept(scores[..., :rows] > _HIDDEN)
        return scores if kept is None else scores.masked_fill(~F.pad(kept, (0, added), value=True), -torch.inf)

    def _sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        rows, keys = query.shape[-2], key.shape[-2]
        unchanged = lambda: F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if rows != keys or query.dim() != 4:
            return unchanged()
        visible = torch.ones(rows, keys, dtype=torch.bool)
        visible = visible.tril() if is_causal else visible
        bias = attn_mask if attn_mask is not None and attn_mask.dtype is not torch.bool else None
        if attn_mask is not None:
            visible = visible & (attn_mask if bias is None else attn_mask > _HIDDEN)
        kept = self._kept(visible.expand(*query.shape[:2], rows, keys))
        if kept is None:
            return unchanged()
        mask = kept if bias is None else bias.expand(kept.shape).masked_fill(~kept, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, False, **more)

    def _kept(self, visible: Tensor) -> Tensor | None:
        """What sinks and window leave of [..., rows, keys]; None where it is not plainly causal, or too short for that to show."""
        rows = visible.shape[-1]
        if rows <= SINKS + WINDOW or not torch.equal(visible, torch.ones(rows, rows, dtype=torch.bool).tril().expand_as(visible)):
            return None
        self.changed += 1
        four = visible if visible.dim() == 4 else visible[:, None]
        kept = four & sink_window_mask(four, SINKS, WINDOW)
        return kept if visible.dim() == 4 else kept[:, 0]
