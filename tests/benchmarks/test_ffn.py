"""The feed-forward benchmarks: what the quality part skips is what the op skips, and which layers it leaves out."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from benchmarks.ffn import quality as ffn_quality
from benchmarks.ffn import run as ffn
from benchmarks.ffn.quality import Skipper
from sparsify.ops import feed_forward
from tests.support.harness import holding, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build

LAYERS = 5


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = build("llama", layers=LAYERS)
    for i, layer in enumerate(model.model.layers):  # similarities on both sides of the threshold
        layer.mlp.down_proj.weight.data *= 2.0 * (1 + (i + 2) % 3)
    return model


def by_rows(model: torch.nn.Module, skipper: Skipper, ids: torch.Tensor) -> torch.Tensor:
    skipper.start(ids.shape[1], ids.device)
    with torch.no_grad(), ffn_quality.skipping(model, skipper):
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("rows", [pytest.param("generated", marks=pytest.mark.slow), "all"])
@pytest.mark.slow
def test_rows_skip_as_the_op_does(model: torch.nn.Module, rows: str) -> None:
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(1))
    skipper = Skipper("similarity", threshold=0.97, skip=2, rows=rows)
    want = by_rows(model, skipper, ids)
    assert 0.1 < skipper.skipped / skipper.seen < 0.6

    def call(m: torch.nn.Module) -> torch.Tensor:
        cache = DynamicCache(config=m.config)
        return torch.cat([m(input_ids=part, **holding(cache)).logits for part in ids.split([8] + [1] * 8, 1)], 1)

    feed_forward.forget_runs()
    options = {"threshold": 0.97, "skip": 2, "cold_first": 1, "cold_last": 1, "warmup": 0, "prefill": rows == "all"}
    got = run(model, call, strict(passes=["ffn_skip"], ffn_skip=options))
    assert visible_error(got.value, want) < 2e-5
    assert visible_error(by_rows(model, Skipper("dense"), ids), want) > 1e-3


def test_whole_layers_lose_their_attention_too(model: torch.nn.Module) -> None:
    ids = torch.randint(3, VOCAB, (1, 8))
    got = by_rows(model, Skipper("whole_layers", layers=tuple(range(LAYERS)), rows="all"), ids)
    with torch.no_grad():
        want = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    torch.testing.assert_close(got, want)


def test_few_layers_are_left_out_in_all_ways_and_many_by_share() -> None:
    few = ffn_quality.layer_sets(torch.rand(6, 4), [0.25], (1, 1))
    assert len(few) == 6 + 15 + 4 and (1, 2, 3) in few and (0, 1, 2) not in few
    table = torch.linspace(0.1, 0.9, 24)[:, None].expand(24, 4)
    many = ffn_quality.layer_sets(table, [0.1, 0.25, 0.9], (2, 4))
    assert many[0] == (18, 19) and (14, 15, 16, 17, 18, 19) in many
    assert all(2 <= i < 20 for chosen in many for i in chosen) and len(many) == 6


def test_cells_cover_the_shares() -> None:
    table = torch.rand(12, 300, generator=torch.Generator().manual_seed(0))
    found = ffn_quality.cells(table, [0.1, 0.25])
    assert {c.kind for c in found} == {"similarity", "random", "layers", "whole_layers"}
    assert {c.rows for c in found if c.kind == "similarity"} == {"generated", "all"}


def test_quality_needs_a_model() -> None:
    with pytest.raises(SystemExit):
        ffn.parse(["--parts", "quality"])
