"""fastv's rule; what it does to models, `test_image_passes` says."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify.generation.regions import narrowing
from sparsify.planning.config.config import load
from sparsify.planning.registry import discover
from tests.support.image_selection import rows


def test_what_is_looked_at_goes_on():
    mass = torch.tensor([[[9.0, 1, 2, 3, 0, 0], [9, 5, 0, 0, 0, 0]]])
    method = discover()["fastv"](keep=1)
    assert method.choose(rows(torch.zeros(1, 6, 2), [1, 2, 3], 4, mass)).tolist() == [[0, 1, 4, 5]]
    assert method.choose(rows(torch.zeros(1, 6, 2), [1, 2, 3], 5, mass)).tolist() == [[0, 1, 3, 4, 5]]
    assert method.choose(rows(torch.zeros(1, 6, 2), [1, 2, 3], 3, mass, padding=1)).tolist() == [[1, 4, 5]]


@pytest.mark.parametrize("options", [{"keep": 1.5}, {"keep": 0}, {"layer": -1}, {"queries": 0}])
def test_options_are_checked(options):
    with pytest.raises(sparsify.errors.ConfigError):
        sparsify.compile(torch.nn.Linear(2, 2), fastv=options)


def test_a_rule_for_the_layer_that_it_chooses_by_itself_leaves_it_out():
    paths = [f"model.layers.{number}" for number in range(4)]
    for layers, named, acts in (("1", {}, False), ("2", {}, True), ("2", {"layer": 2}, False)):
        given = {"passes": ["fastv", "dense"], "fastv": {"keep": 0.5, **named}, "rules": [{"layers": layers, "method": []}]}
        config = load(given, method_models=discover())
        assert (narrowing.asked(config, None, paths) is not None) == acts
