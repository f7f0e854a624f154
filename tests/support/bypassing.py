"""What a model must give whose tokens bypass layers: one pass of an eager model over the whole text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@torch.no_grad()
def logits(model: torch.nn.Module, whole: dict[str, torch.Tensor], gone: Mapping[int, range]) -> torch.Tensor:
    """Logits of a text, [rows, columns, vocabulary].

    gone: by column the layers that its token bypasses: it leaves them as it came, and other tokens do not see its key there.
    """
    width = whole["input_ids"].shape[1]
    handles = []

    def hidden(layer: int) -> torch.Tensor:
        return torch.tensor([layer in gone.get(column, ()) for column in range(width)])

    def attend(module, query, key, value, attention_mask, scaling=None, **unused):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
        visible = torch.ones(width, width, dtype=torch.bool).tril()[None, None] if attention_mask is None else attention_mask
        scores = (query.double() @ key.mT * (scaling or query.shape[-1] ** -0.5)).masked_fill(
            ~visible | hidden(module.layer_idx), float("-inf")
        )
        return (torch.nan_to_num(scores.softmax(-1)) @ value).to(query.dtype).transpose(1, 2).contiguous(), None

    def passed_by(number):
        def hook(module, args, given, result):
            first, tupled = (result[0], True) if isinstance(result, tuple) else (result, False)
            before = args[0] if args else given["hidden_states"]
            first = torch.where(hidden(number)[None, :, None], before, first)
            return (first, *result[1:]) if tupled else first

        return hook

    AttentionInterface.register("bypassed", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("bypassed", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("bypassed")
    try:
        for number, layer in enumerate(model.model.layers):
            handles.append(layer.register_forward_hook(passed_by(number), with_kwargs=True))
        return model(**whole, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
