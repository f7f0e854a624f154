"""Feed-forward blocks in the graphs of every family, and graphs that must not match."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.matching.attention import find_attention
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.matching.sites import FeedForwardSite
from tests.support.cases import every
from tests.support.tiny_models import EAGER_ONLY, FAMILIES, VOCAB, build

LAYERS = 2
# family: layout, activation, norm, post-norm, terms of the sum beside the block
GATED = ("split", "silu", "rms", "none", 1)
EXPECTED = {
    "phi3": ("gate_up", "silu", "rms", "none", 1),
    "gemma3": ("split", "gelu_tanh", "rms_offset", "rms_offset", 1),
    "gemma2": ("split", "gelu_tanh", "rms_offset", "rms_offset", 1),
    "gemma": ("split", "gelu_tanh", "rms_offset", "none", 1),
    "olmo2": ("split", "silu", "none", "rms_fp32", 1),
    "gpt_neox": ("plain", "gelu", "layer", "none", 2),
    "gpt2": ("plain", "gelu_tanh", "layer", "none", 1),
    "opt": ("plain", "relu", "layer", "none", 1),
    "bloom": ("plain", "gelu_tanh", "layer", "none", 1),
    "starcoder2": ("plain", "gelu_tanh", "layer", "none", 1),
    "cohere": ("split", "silu", "none", "none", 1),
    "gptj": ("plain", "gelu_tanh", "none", "none", 2),
    "phi": ("plain", "gelu_tanh", "none", "none", 2),
    "falcon": ("plain", "gelu", "layer", "none", 2),
    "falcon_mqa": ("plain", "gelu", "none", "none", 2),
    "falcon_alibi": ("plain", "gelu", "none", "none", 2),
    "stablelm": ("split", "silu", "layer", "none", 1),
}
REFUSED = dict.fromkeys(("gpt_oss", "qwen3_moe", "mixtral"), "experts")


def sites_of(function, *inputs, **keywords) -> list[FeedForwardSite]:
    """The feed-forward sites of the one graph that a call makes."""
    found: list[list[FeedForwardSite]] = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        found.append(find_feed_forward(gm, find_attention(gm)))
        assert str(gm.graph) == before
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs, **keywords)
    torch._dynamo.reset()
    (sites,) = found
    return sites


@pytest.mark.parametrize("family", every(5, FAMILIES))
@pytest.mark.samples(2)
def test_every_layer_has_one_site(family):
    model = build(family, "eager" if family in EAGER_ONLY else "sdpa", layers=LAYERS)
    sites = sites_of(model.forward, input_ids=torch.randint(3, VOCAB, (2, 5)), use_cache=False)
    assert [(s.layer, s.index, s.count) for s in sites] == [(0, 0, LAYERS), (1, 1, LAYERS)]
    assert all(s.name and s.phase == "prefill" for s in sites if not s.near_miss)
    if family == "deepseek_v3":  # its first layer is dense
        assert not sites[0].near_miss and "experts" in sites[1].near_miss
        return
    for site in sites:
        if family in REFUSED:
            assert REFUSED[family] in site.near_miss
            continue
        assert site.near_miss == ""
        read = (site.layout, site.activation, site.norm.kind, site.post_norm.kind, len(site.residuals))
        assert read == EXPECTED.get(family, GATED)
        assert (site.rows, site.query_len, site.hidden) == (10, 5, 64)
        assert site.transposed == (family == "gpt2")


def test_decode_is_told_from_prefill():
    sites = sites_of(build("llama").forward, input_ids=torch.tensor([[3], [4]]), use_cache=False)
    assert [s.phase for s in sites] == ["decode"] * LAYERS
    assert all(s.positions is not None and s.rows == 2 for s in sites)


class Block(nn.Module):
    """x + down(act(up(x))), with a part that a test replaces."""

    def __init__(self, act=F.relu, combine=lambda x, y: x + y, inner=None):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act, self.combine, self.inner = act, combine, inner

    def forward(self, x):
        hidden = self.act(self.up(x))
        out = self.combine(x, self.down(hidden))
        return (out, hidden) if self.inner else out


def test_a_bare_block_matches():
    (site,) = sites_of(Block(), torch.randn(2, 3, 8))
    assert (site.layout, site.activation, site.near_miss, site.intermediate) == ("plain", "relu", "", 16)


def polynomial(x, cubic=0.044715):
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + cubic * x**3)))


def test_the_written_out_gelu_is_read_and_nothing_near_it():
    (site,) = sites_of(Block(polynomial), torch.randn(1, 1, 8))
    assert site.activation == "gelu_tanh"
    assert sites_of(Block(lambda x: polynomial(x, 0.05)), torch.randn(1, 1, 8)) == []


@pytest.mark.parametrize("act", [torch.sigmoid, lambda x: x, lambda x: F.relu(x) ** 2, F.mish])
def test_other_activations_are_no_site(act):
    assert sites_of(Block(act), torch.randn(1, 1, 8)) == []


@pytest.mark.parametrize(
    "block, words",
    [
        (Block(combine=lambda x, y: y), "not added to a residual"),
        (Block(combine=lambda x, y: x * 2 + F.dropout(y, 0.5, True)), "dropout is active"),
        (Block(inner=True), "used elsewhere"),
        (Block(combine=lambda x, y: x[:, :1] + y), "broadcast"),
        (Block(combine=lambda x, y: operator.iadd(x * 2, y)), "another tensor in place"),
        (Block(combine=lambda x, y: y.add_(x)), "not added to a residual"),
        (Block(combine=lambda x, y: (y, y + x)[1] + y.sum()), "not added to a residual"),
    ],
)
def test_near_misses_say_why(block, words):
    (site,) = sites_of(block, torch.randn(1, 3, 8))
    assert words in site.near_miss


def test_an_operand_written_before_the_block_ends_is_a_near_miss():
    class Writes(Block):
        def forward(self, x):
            residual = x * 2
            update = self.down(self.act(self.up(residual)))
            residual.mul_(3)
            return residual + update

    (site,) = sites_of(Writes(), torch.randn(1, 3, 8))
    assert "written in place" in site.near_miss


def test_a_scale_belongs_to_the_block():
    (site,) = sites_of(Block(combine=lambda x, y: x + y * 0.5), torch.randn(1, 3, 8))
    assert (site.scale, site.near_miss) == (0.5, "")
