"""What a model must give whose later layers see only some tokens of a prompt: computed by eager models, layer by layer."""

from __future__ import annotations

import math

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@torch.no_grad()
def chosen(model: torch.nn.Module, prompt: dict[str, torch.Tensor], select: dict) -> list[list[int]]:
    """Columns that stay in each row, from attention weights that eager attention writes out, one token after the other.

    select: options of token_select, all of layer, heads, keep, queries, window, sinks and kernel.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model(**prompt, output_attentions=True, use_cache=False).attentions[select["layer"]]
    model.set_attn_implementation(before)
    found = []
    for row, by_head in enumerate(weights):
        mask = prompt.get("attention_mask")
        columns = list(range(by_head.shape[-1])) if mask is None else mask[row].nonzero()[:, 0].tolist()
        heads = range(len(by_head)) if select["heads"] == "all" else select["heads"]
        score = [sum(float(by_head[h, q, c]) for h in heads for q in columns[-select["queries"] :]) for c in columns]
        always = {*range(select["sinks"]), *range(len(columns) - select["window"], len(columns))}
        score = [0.0 if i in always else s for i, s in enumerate(score)]
        reach = select["kernel"] // 2
        smooth = [sum(score[max(0, i - reach) : i + reach + 1]) for i in range(len(score))]
        rest = sorted((i for i in range(len(columns)) if i not in always), key=lambda i: -smooth[i])
        keep = select["keep"] if isinstance(select["keep"], int) else math.ceil(select["keep"] * len(columns))
        found.append(sorted(columns[i] for i in [*always, *rest[: max(0, keep - len(always))]] if i < len(columns)))
    return found


@torch.no_grad()
def hidden_later(
    model: torch.nn.Module, whole: dict[str, torch.Tensor], kept: list[list[int]], prompt_len: int, layer: int
) -> torch.Tensor:
    """Logits of a text whose first `prompt_len` columns layers behind `layer` see only at `kept`, columns of each row."""
    width = whole["input_ids"].shape[1]
    seen = torch.ones(len(kept), width, dtype=torch.bool)
    for row, columns in enumerate(kept):
        seen[row, :prompt_len] = False
        seen[row, columns] = True

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **unused):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        if not getattr(module, "is_causal", True):  # of a vision tower
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        visible = causal if attention_mask is None else attention_mask
        if getattr(module, "layer_idx", -1) > layer:
            visible = visible & seen[:, None, None]
        scores = query.double() @ key.mT * (scaling or query.shape[-1] ** -0.5)
        scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).masked_fill(~visible, float("-inf"))
        if s_aux is not None:  # a learned score by head, whose share nobody gets
            scores = torch.cat((scores, s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        return (torch.nan_to_num(scores.softmax(-1))[..., : key.shape[2]] @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("hidden_later", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("hidden_later", sdpa_mask)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("hidden_later")
    logits = model(**whole, use_cache=False).logits
    model.set_attn_implementation(before)
    return logits
