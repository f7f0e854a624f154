"""Which attentions an eager call has, seen from outside: what the sites of a compiled one are counted against."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax}
_WHOLE = {F.multi_head_attention_forward, torch._native_multi_head_attention}
LOGSUMEXP = {torch.logsumexp, torch.Tensor.logsumexp}
_LSE = "logsumexp"
_FEW = 16  # rows and columns below which a softmax chooses experts, or something else than keys


class Seen(TorchFunctionMode):
    """While it is active: `attentions`, how many by kind; `calls`, of any function of torch. `count` is how many attentions that makes: a
    log-sum-exp is one of its own only where nothing else is, else it goes with a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions: Counter[str] = Counter()
        self.calls = 0

    @property
    def count(self) -> int:
        return sum(self.attentions.values()) - self.attentions[_LSE] or self.attentions[_LSE]

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if kind := _kind(function, args, kwargs):
            self.attentions[kind] += 1
        return function(*args, **kwargs)


def _kind(function: Any, args: tuple, kwargs: dict) -> str:
    if function is F.scaled_dot_product_attention:
        return "sdpa"
    if function in SOFTMAX or function in LOGSUMEXP:
        scores = args[0] if args else kwargs["input"]
        name = _LSE if function in LOGSUMEXP else "softmax"
        return name if scores.dim() >= 3 and min(scores.shape[-2:]) >= _FEW else ""
    if function in _WHOLE:
        return "multi_head_attention"
    return "flex_attention" if "flex_attention" in getattr(function, "__name__", "") else ""
