"""Padded batches: texts of several lengths, calls over them, and what of their results is of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsify import api
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB


def text(lengths: tuple[int, ...], side: str = "left", later: int = 0) -> dict[str, torch.Tensor]:
    """Rows of these lengths with their padding on a side, and `later` tokens behind all of them."""
    columns = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), columns + later), generator=torch.Generator().manual_seed(columns))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(columns - length) if side == "left" else slice(length, columns)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@dataclass
class Calls:
    """What calls over one text gave. logits: side by side. lengths: of the cache's layers after them."""

    logits: torch.Tensor
    lengths: list[int]
    plans: list[Plan]

    @property
    def batches(self) -> list[Decision]:
        return [d for plan in self.plans for d in plan.decisions if d.kind == "batch"]

    @property
    def masks(self) -> set[str]:
        return {d.mask for plan in self.plans for d in plan.decisions if d.kind == "attention" and d.phase == "prefill"}


@torch.no_grad()
def calls(model: torch.nn.Module, whole: dict[str, torch.Tensor], cache: Any, *lengths: int) -> Calls:
    """The text in calls of these lengths, one after the other, over one cache; None: without."""
    parts, at = [], 0
    with api.collect_plans() as plans:
        for length in lengths:
            now = {name: value[:, at : at + length] for name, value in whole.items()}
            if "attention_mask" in whole:
                now["attention_mask"] = whole["attention_mask"][:, : at + length]
            parts.append(model(**now, **(holding(cache) if cache is not None else {"use_cache": False})).logits)
            at += length
    counts = [] if cache is None else [int(layer.get_seq_length()) for layer in cache.layers]
    return Calls(torch.cat(parts, 1), counts, plans)


def tokens_of(found: torch.Tensor, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of [batch, columns, ...] the columns that hold a token, [tokens, ...]."""
    return found[whole["attention_mask"][:, : found.shape[1]].bool()]
