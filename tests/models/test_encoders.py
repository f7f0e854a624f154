"""Attention without an order: encoders, cross-attention and vision models, exactly and by blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from sparsify.ops import block_lists
from sparsify.ops.selection import SelectCall
from tests.support.harness import run, strict, visible_error
from tests.support.tiny_models import VOCAB, build_class

CLOSE = 2e-5
PADDING, WINDOW = "padding", "causal from 64, window 129, padding"


def ids() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 70:] = 0
    return tokens * mask, mask


def encode(model):
    tokens, mask = ids()
    return model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, :70]


def translate(model):
    tokens, mask = ids()
    return model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens[:, :40], use_cache=False).last_hidden_state


def look(model):
    return model(pixel_values=torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)).last_hidden_state


# name: (class, fields of its configuration, how it is called, masks of the plan)
MODELS = {
    "bert": ("BertModel", {}, encode, {PADDING}),
    "modernbert": ("ModernBertModel", {"local_attention": 128, "pad_token_id": 0}, encode, {PADDING, WINDOW}),
    "bart": ("BartModel", {"encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}, translate, {PADDING, "causal"}),
    "vit": ("ViTModel", {"image_size": 64}, look, {"none"}),
}


def build(name: str, attention: str) -> torch.nn.Module:
    import transformers

    kind, overrides = MODELS[name][:2]
    return build_class(getattr(transformers, kind), attention, overrides=overrides)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["bert", "bart", *(pytest.param(n, marks=pytest.mark.slow) for n in ("modernbert", "vit"))])
@pytest.mark.samples(1)
def test_every_attention_is_rewritten(name, attention):
    model, call, masks = build(name, attention), *MODELS[name][2:]
    with torch.no_grad():
        want = call(model)
    for method, options in (("dense", {}), ("xattention", {"xattention": {"threshold": 1.0}})):
        got = run(model, call, strict(passes=[method], **options))
        assert got.graphs == 1 and got.rewritten(method) == got.sites >= 2
        assert {d.mask for p in got.plans for d in p.decisions} == masks
        assert visible_error(got.value, want) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize(("query_len", "key_len"), [(200, 200), (130, 330), (300, 70)])
def test_blocks_are_chosen_without_an_order(query_len, key_len):
    """Cross-attention over padded keys: what is visited is what the selection says, past and future alike."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads, length: 2 * torch.randn(2, heads, length, 16, generator=generator)
    query, key, value = draw(4, query_len), draw(2, key_len), draw(2, key_len)
    keep = torch.ones(2, key_len, dtype=torch.long)
    keep[0, key_len // 2 :] = 0

    def attend(query, key, value, keep):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None, :].bool(), enable_gqa=True)

    torch._dynamo.reset()
    options = strict(passes=["xattention"], xattention={"stride": 8, "block": 64, "threshold": 0.3, "estimate": []})
    with api.collect_plans() as plans:
        got = torch.compile(attend, backend="sparsify", options=options, fullgraph=True)(query, key, value, keep)
    assert [d.method for p in plans for d in p.decisions] == ["xattention"]
    call = {"scale": 0.25, "causal": False, "pool": "row", "stride": 8, "block_size": 64, "threshold": (0.3,)}
    lists = SelectCall(query, key, key_flags=keep.to(torch.uint8), **call).run()
    blocks = block_lists.to_dense(*lists, -(-key_len // 64)).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :query_len, :key_len]
    seen = blocks & keep[:, None, None].bool()
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.25).masked_fill(~seen, -torch.inf)
    want = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if key_len > 64 * 2:
        assert (got - attend(query, key, value, keep)).abs().max() > 1e-2
