"""Sinks and a window forced on a model's eager execution from outside, whatever its attention looks like."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.support.harness import sink_window_mask

_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax}
_HIDDEN = -1e30  # masks fill with −inf or the lowest number of the dtype, scores are small


class _SinkWindow(TorchFunctionMode):
    """Masks each attention's scores once more. Softmaxes of four dimensions are attentions, and of three: batch and heads are merged.
    Layers come in order."""

    def __init__(self, sinks: int, window: int, windowed: list[bool], added_columns: int, prompts_only: bool):
        super().__init__()
        self.sinks, self.window, self.windowed = sinks, window, windowed
        self.added_columns, self.prompts_only = added_columns, prompts_only
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.sdpa(*args, **kwargs)
        if function is torch.logsumexp and args[0].dim() == 4:  # of the rows whose softmax comes next
            args = (self.hidden(args[0]), *args[1:])
        if function in _SOFTMAX:
            scores = args[0] if args else kwargs.pop("input")
            if scores.dim() in (3, 4):
                four = scores if scores.dim() == 4 else scores[None]
                scores, self.calls = self.hidden(four).reshape(scores.shape), self.calls + 1
            args = (scores, *args[1:])
        return function(*args, **kwargs)

    def hidden(self, scores: torch.Tensor) -> torch.Tensor:
        if self.windowed[self.calls % len(self.windowed)] or (self.prompts_only and scores.shape[2] == 1):
            return scores
        keys = scores.shape[-1] - self.added_columns
        kept = sink_window_mask(scores[..., :keys] > _HIDDEN, self.sinks, self.window)
        return scores.masked_fill(~F.pad(kept, (0, self.added_columns), value=True), -torch.inf)

    def sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.mT * (scale if scale is not None else query.shape[-1] ** -0.5)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
        scores, self.calls = self.hidden(scores), self.calls + 1
        return torch.nan_to_num(scores.softmax(-1)) @ value


@torch.no_grad()
def sink_window_run(model: torch.nn.Module, call: Any, *, sinks: int, window: int, prompts_only: bool = False) -> Any:
    """`call(model)` eagerly with `sinks` + `window` in every layer that has no sliding window of its own; prompts_only: not in decode."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    columns = 1 if config.model_type == "gpt_oss" else 0  # its sinks are a column of the scores
    with _SinkWindow(sinks, window, [k == "sliding_attention" for k in kinds], columns, prompts_only) as mode:
        result = call(model)
    if not mode.calls:
        raise AssertionError("no attention was seen")
    return result
