"""Models without weights: their sites are those that the compiler finds in the real model, layer by layer."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch

pytest.importorskip("transformers")

from sparsify import SparseCache
from sparsify.commands.cost import meta_model
from sparsify.errors import UnsupportedError
from tests.support.harness import holding
from tests.support.tiny_models import build

_SIZES = (
    *("name", "layer", "index", "phase", "batch", "query_heads", "kv_heads", "query_len", "key_len", "qk_head_dim", "v_head_dim"),
    *("scale", "softcap", "source", "near_miss", "rows", "hidden", "intermediate", "count", "layout", "activation"),
)


def described(call: meta_model.CallSites) -> list[dict]:
    """All that is known of each site but nodes, dtype and device."""
    found = []
    for site in itertools.chain(*call.by_kind):
        numbers = {name: getattr(site, name) for name in _SIZES if hasattr(site, name)}
        numbers = {name: value for name, value in numbers.items() if not isinstance(value, torch.fx.Node)}
        found.append({"kind": site.kind, "mask": site.mask_text, **numbers})
    return found


def compiled(model: torch.nn.Module, length: int, cache) -> list[list[dict]]:
    """The same from the real model on real tokens, as torch.compile captures prompt and next token."""
    whole = dataclasses.replace(meta_model.build("", config=model.config, cut=False), model=model)
    calls = []
    with torch.no_grad(), meta_model._capture(model) as (forward, graphs):
        for tokens in (length, 1):
            graphs.clear()
            forward(input_ids=torch.zeros(2, tokens, dtype=torch.int64), **holding(cache), use_cache=True, logits_to_keep=1)
            kinds = zip(*(graph.by_kind for graph in graphs), strict=True)
            calls.append(meta_model.CallSites(*(tuple(site for sites in kind for site in sites) for kind in kinds)))
    assert len(whole.kinds) == model.config.num_hidden_layers
    return [described(call) for call in calls]


_slow = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("llama", "qwen3", "mistral", "mistral_window", "qwen3_moe", "gpt2", "deepseek_v3")
]


@pytest.mark.parametrize("family", ["gemma3", *_slow])
@pytest.mark.slow
def test_sites_without_weights_are_the_compilers(family):
    from transformers import DynamicCache

    model = build(family, layers=3)
    found = meta_model.build("", config=model.config).calls(40, batch=2)
    assert [described(found.prefill), described(found.decode)] == compiled(model, 40, DynamicCache(config=model.config))
    assert len(found.prefill.attention) == len(found.decode.attention) == 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv", pytest.param("streaming_llm", marks=pytest.mark.slow)])
def test_a_sparse_cache_is_captured_too(policy):
    model = build("gemma3", layers=3)
    options = {"window": 4} if policy == "snapkv" else {}
    make = lambda config: SparseCache(config, policy, 16, **options)
    found = meta_model.build("", config=model.config).calls(40, 2, make)
    assert [described(found.prefill), described(found.decode)] == compiled(model, 40, make(model.config))
    assert [site.key_len for site in found.decode.cache] == [8, 16, 8]
    assert found.cache_bytes[1] > found.cache_bytes[0]


@pytest.mark.slow
def test_lengths_in_between_are_not_captured_again_where_the_ends_agree(monkeypatch):
    model = meta_model.build("", config=build("mistral_window", layers=2).config)
    captured, calls = [], meta_model.MetaModel.calls
    monkeypatch.setattr(meta_model.MetaModel, "calls", lambda self, n, *rest: captured.append(n) or calls(self, n, *rest))
    found = model.at_lengths([4, 32, 64, 128], 2)
    # the window of 8 does not show at 4 tokens, so 32 is captured; 64 is not
    assert sorted(captured) == [4, 32, 128]
    exact = calls(model, 64, 2)
    assert [described(found[64].prefill), described(found[64].decode)] == [described(exact.prefill), described(exact.decode)]
    assert found[64].cache_bytes == exact.cache_bytes
    assert found[64].prefill.attention[0].key.meta["example_value"].shape == (2, 2, 64, 16)


@pytest.mark.slow
def test_layers_are_captured_once_for_each_kind():
    model = meta_model.build("", config=build("gemma3", layers=6).config)
    assert (model.kinds, len(model.model.model.layers)) == ((0, 1, 0, 1, 0, 1), 2)
    assert model.calls(64).cache_bytes == (2 * 2 * 7 * 16 * 4, 2 * 2 * 64 * 16 * 4) * 3, "keys and values of two heads, in float32"


def test_parameters_and_experts_are_those_of_the_real_model():
    for family, tied in (("llama", False), ("gemma3", True), ("mixtral", False), ("gpt2", True)):
        real = build(family, layers=2)
        model = meta_model.build(family, config=real.config)
        assert model.parameters == sum(p.numel() for p in real.parameters())
        assert model.tied == tied
        experts = model.layers[1]
        if family in ("qwen3_moe", "mixtral"):
            assert (experts.experts, experts.active) == (4, 2)
            inside = sum(p.numel() for n, p in real.named_parameters() if ".layers.1." in n and ".experts." in n)
            assert 4 * sum(i * o for i, o in experts.expert) == inside
        else:
            assert experts.experts == 0
            inside = sum(p.numel() for n, p in real.named_parameters() if re.search(r"\.1\.", n) and p.dim() == 2)
            assert sum(i * o for i, o in experts.matrices) == inside


def test_a_missing_configuration_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UnsupportedError, match="cannot build the model"):
        meta_model.build(str(tmp_path))


def test_rope_that_reads_positions_is_captured():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = build("llama", layers=2, rope_parameters=rope).config
    assert len(meta_model.build("", config=config).calls(2048).prefill.attention) == 2
