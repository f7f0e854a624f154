"""What a plan file says of its making survives the file, and lists of numbers take one line."""

from __future__ import annotations

import dataclasses

import pytest

from sparsify.errors import PlanError
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import Provenance

MADE = Provenance(
    model="m", model_type="llama", text="t", settings="s", lengths=[256, 512], pieces=[1, 2], seed=3, budget={"density": 0.1}, at=512,
    target="H200", seconds=1e-3, dense_seconds=2e-3, density=0.1, errors={"256": 0.01, "512": 0.02}, gap=0.0, versions={"torch": "2"},
)  # fmt: skip


def test_a_round_trip():
    plan = Plan(min_length=4096, provenance=MADE)
    assert Plan.from_json(plan.to_json()) == plan
    assert '  "lengths": [256, 512],' in plan.to_json().splitlines()
    assert Plan.from_json(Plan().to_json()) == Plan()


@pytest.mark.parametrize("wrong", ['"seed": "3"', '"seed": 3, "more": 1'])
def test_it_is_read_as_strictly_as_the_rest(wrong):
    text = Plan(provenance=MADE).to_json().replace('"seed": 3', wrong)
    with pytest.raises(PlanError, match="not a plan file"):
        Plan.from_json(text)
    assert dataclasses.asdict(MADE)["seed"] == 3
