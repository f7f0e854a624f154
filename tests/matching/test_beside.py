"""What a graph costs beside its attention, against what `sparsify cost` counts from parameters."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify import pipeline
from sparsify.api import collect_plans
from sparsify.commands.cost import forecaster, meta_model
from sparsify.planning import registry
from sparsify.planning.config import config
from tests.support.tiny_models import build

LENGTH = 200
OPTIONS = {"passes": ["dense"], "strict": True}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma"])
@torch.no_grad()
def test_parts_are_those_of_a_forecast(family):
    model = build(family)
    found = sparsify.explain(model, input_ids=torch.full((1, LENGTH), 5), use_cache=False, logits_to_keep=1, options=OPTIONS)
    settings = config.load(OPTIONS, method_models=registry.discover())
    meta = meta_model.build(family, config=model.config, dtype=torch.float32)
    context = pipeline.make_context(torch.device("cpu"), settings)
    wanted = forecaster.Forecaster(meta, settings, context).forecast([LENGTH]).rows[0].dense.prefill
    assert len(found.rewritten) == 2 and sum(d.dense_seconds or 0 for d in found.decisions) == pytest.approx(wanted.attention)
    assert found.beside["feed-forward"] == pytest.approx(wanted.feed_forward)
    assert found.beside["projections"] == pytest.approx(wanted.projections)
    assert found.beside["logits"] == pytest.approx(wanted.head)
    # a forecast counts the cache's store, too
    assert 0.7 * wanted.elementwise <= found.beside["elementwise"] <= 1.1 * wanted.elementwise


@torch.no_grad()
def test_only_explain_counts_them():
    model = build("llama", layers=1)
    with collect_plans() as plans:
        torch.compile(model.forward, backend="sparsify", options={**OPTIONS, "lower": "eager"})(torch.full((1, 20), 5), use_cache=False)
    assert len(plans) == 1 and plans[0].beside == {}
