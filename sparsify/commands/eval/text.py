"""Mean negative log-likelihood of a text: what answers do not show, and what hides wrong answers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from sparsify.commands.eval.cells import Cell
from sparsify.commands.eval.run import Run
from sparsify.errors import UnsupportedError

_MOST = 4096  # tokens of a window that are judged
_ROWS = 1024  # of logits, turned into float32 at once


@dataclass(frozen=True)
class TextNll:
    """Windows of `length` tokens, spread over the text; of each the last half is judged, at most 4096 tokens.

    ids: int64 [tokens] of the text. Raises UnsupportedError where they are fewer than `length`.
    """

    ids: torch.Tensor
    length: int
    windows: int
    name: str = "nll of text"

    def __post_init__(self) -> None:
        if len(self.ids) < self.length:
            raise UnsupportedError(f"the text has {len(self.ids)} tokens, and a window {self.length}", where="--text", hint="a longer text")

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def starts(self) -> list[int]:
        """First tokens of the windows, which overlap no more than they must."""
        count = max(1, min(self.windows, len(self.ids) // self.length))
        return [round(i * (len(self.ids) - self.length) / max(1, count - 1)) for i in range(count)]

    def ask(self, run: Run) -> list[Cell]:
        if run.setting.cache is not None:  # nothing follows the text, so that a cache decides nothing
            run.answered(len(self))
            return []
        judged = min(_MOST, self.length // 2)
        scores = []
        with run.measuring() as measured:
            for start in self.starts:
                ids = self.ids[start : start + self.length][None].to(run.device)
                scores.append(_nll(run.model, ids, judged))
                run.answered(1)
        questions = tuple(map(str, self.starts))
        cell = Cell(setting=run.setting.name, task=self.name, length=self.length, metric="nll", higher_is_better=False)
        return [replace(cell, scores=tuple(scores), questions=questions, **measured.data())]


def _nll(model: Any, ids: torch.Tensor, judged: int) -> float:
    """Nats a token over the last `judged` tokens of ids [1, n]."""
    some = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(ids, use_cache=False, **({"logits_to_keep": judged + 1} if some else {})).logits[0, -judged - 1 : -1]
    targets = ids[0, -judged:]
    total = sum(
        F.cross_entropy(logits[i : i + _ROWS].float(), targets[i : i + _ROWS], reduction="sum").item() for i in range(0, judged, _ROWS)
    )
    return total / judged
