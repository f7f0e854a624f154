"""What a model expected of the tokens that it was given: SirLLM's number of a token (arXiv 2405.12528, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Outlook:
    """Goes from call to call, so that the first token of one is judged by the logits of the call before it."""

    def __init__(self) -> None:
        self._next: Tensor | None = None  # fp32 [batch, vocabulary], logits of what comes next
        self._known: Tensor | None = None  # bool [batch], rows that have had a token since the turn began, whose logits they are

    def forget(self) -> None:
        """A turn begins: nothing foretells its first token."""
        self._next = self._known = None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """What the rows of the batch become, as `change` does it to a tensor whose first dimension they are."""
        if self._next is not None and self._known is not None:
            self._next, self._known = change(self._next), change(self._known)

    def surprise(self, logits: Tensor, input_ids: Tensor, is_token: Tensor | None) -> Tensor:
        """-log p(token | those before it), fp32 [batch, tokens]; 0 for padding.

        Args:
            logits: [batch, tokens, vocabulary]. input_ids: int64 [batch, tokens]. is_token: bool [batch, tokens]; None: no padding.
        """
        batch, count, vocabulary = logits.shape
        known = torch.zeros(batch, dtype=torch.bool, device=logits.device) if self._known is None else self._known
        if is_token is None:
            is_token = torch.ones(batch, count, dtype=torch.bool, device=logits.device)
        at = torch.arange(count, device=logits.device)
        last = torch.where(is_token, at, -1).cummax(-1).values  # of each column, the last token up to it
        before = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), 1)
        found = input_ids.new_zeros(batch, count, dtype=torch.float32)
        for row in range(batch):  # fp32 logits of one row at a time
            own = logits[row].float()
            foretold = own[before[row].clamp(min=0)]
            if self._next is not None:
                foretold = torch.where((before[row] < 0)[:, None], self._next[row], foretold)
            found[row] = F.cross_entropy(foretold, input_ids[row], reduction="none")
        first = is_token & (before < 0) & ~known[:, None]
        most = found.masked_fill(first | ~is_token, -torch.inf).amax(-1, keepdim=True)
        found = torch.where(first, torch.where(most.isinf(), math.log(vocabulary), most), found)
        newest = last[:, -1]
        end = logits[torch.arange(batch, device=logits.device), newest.clamp(min=0)].float()
        if self._next is not None:
            end = torch.where((newest < 0)[:, None], self._next, end)
        self._next, self._known = end, known | (newest >= 0)
        return found.masked_fill(~is_token, 0)
