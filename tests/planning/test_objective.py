"""What is minimised, which errors are allowed, and the guards that a symbolic length gets for it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify import pipeline
from sparsify.errors import ConfigError
from sparsify.passes.dense import Dense
from sparsify.passes.sink_window import SinkWindow
from sparsify.passes.xattention import XAttention
from sparsify.planning import method, objective, registry
from sparsify.planning.choose import make_plan
from sparsify.planning.config import config
from sparsify.planning.decision import Decision
from sparsify.planning.method import Context
from sparsify.planning.plan import Plan
from tests.planning.test_plan import H200, plan_for, site
from tests.support.harness import compiled
from tests.support.tiny_models import build

N = sympy.Symbol("n", integer=True, positive=True)
NAME = "model.layers.3.self_attn"
PASSES = ["xattention", "sink_window", "dense"]


def proposal(seconds, scratch=0, from_=0, of=None) -> method.Proposal:
    return method.Proposal(of or Dense(), sympy.sympify(seconds), min_key_len=from_, scratch=sympy.sympify(scratch))


def select(proposals, goal, keys: int, asked: list[int] | None = None) -> int:
    reaches = lambda bound: (asked.append(bound) if asked is not None else None) or keys >= bound
    shared = {"operands": 1000 * N, "dense": N**2}
    return objective.select(proposals, goal, key_len=N, hints={N: keys}, **shared, reaches=reaches)


def test_each_objective_has_its_winner():
    fast, small, middle = proposal(N**2 / 4, 8000 * N), proposal(N**2), proposal(N**2 / 3, 100 * N)
    assert [select([small, fast, middle], goal, 1 << 16) for goal in ("time", "memory", "balanced")] == [1, 0, 2]
    assert select([small, proposal(N**2 / 2)], "memory", 4096) == 1  # equal bytes: seconds decide


def test_a_symbolic_length_is_asked_for_the_bounds_between_winners_only():
    short, long = proposal(N * 10**5), proposal(N**2)  # equal at 100 000
    asked: list[int] = []
    assert select([short, long], "time", 64 << 10, asked) == 1
    assert select([short, long], "time", 128 << 10, asked) == 0
    assert asked[0] == asked[1] and 100_000 <= asked[0] < 100_000 + 128
    assert select([short, proposal(2 * N * 10**5)], "time", 4096, asked) == 0 and len(asked) == 2


def test_a_method_does_not_win_below_the_length_from_which_it_pays():
    late = proposal(N, from_=50_000)
    assert [select([late, proposal(N**2)], "time", n) for n in (4096, 49_000, 52_000)] == [1, 1, 0]


@given(st.lists(st.tuples(st.integers(1, 4 << 20), st.integers(0, 4)), max_size=8))
def test_at_most_three_regimes_and_every_one_was_a_winner(found):
    regimes = [(0, 9)]
    for start, winner in sorted(dict(found).items()):
        if winner != regimes[-1][1]:
            regimes.append((start, winner))
    kept = objective.merged(regimes)
    assert len(kept) <= 3 and set(kept) <= set(regimes) and kept[0] == (0, 9)
    assert all(one[1] != other[1] for one, other in itertools.pairwise(kept))
    assert len(regimes) > 3 or kept == regimes


@given(st.integers(65, 4 << 20))
def test_switches_find_the_length_to_a_step(bound):
    first, second = objective.switches(lambda n: int(n >= bound))
    assert first == (0, 0) and second[1] == 1 and 0 <= second[0] - bound < 64


def test_a_compiled_model_gets_one_graph_for_each_winner(monkeypatch):
    """On a GPU's costs, with the reference computing: short prompts dense, long ones windowed, and nothing is compiled twice."""
    model = build("llama", layers=1, max_position_embeddings=8192)
    monkeypatch.setattr(pipeline, "make_context", lambda device, settings: Context(H200, "reference"))
    options = {"strict": True, "lower": "eager", "passes": ["sink_window", "dense"], "objective": "time", "sink_window": {"window": 128}}
    chosen = {}
    with torch.no_grad(), compiled(model, options, dynamic=True) as plans:
        for length in (40, 300, 4000, 200, 3000, 500):
            before = len(plans)
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False, logits_to_keep=1)
            chosen[length] = plans[-1].decisions[0].method if len(plans) > before else None
    assert chosen[40] == "dense"
    assert [method for method in chosen.values() if method] == ["dense", "sink_window"], "one graph on each side, wherever that is"


def measured(*found: tuple[str, dict, float]) -> Plan:
    entries = [{"method": name, "options": options, "error": error} for name, options, error in found]
    return Plan([Decision(NAME, 3, "prefill", {}, "", "xattention", {}, measured=entries)])


@pytest.fixture
def plan_file(tmp_path):
    def write(*found):
        measured(*found).save(tmp_path / "plan.json")
        return str(tmp_path / "plan.json")

    return write


def test_the_objective_chooses_at_a_site():
    chosen = {goal: plan_for(site(131072), passes=PASSES, objective=goal) for goal in ("time", "memory", "balanced")}
    assert {goal: d.method for goal, d in chosen.items()} == {"time": "sink_window", "memory": "sink_window", "balanced": "sink_window"}
    assert "least time" in chosen["time"].reason
    assert any(r.startswith("xattention: ") and "against sink_window" in r and "MiB of scratch" in r for r in chosen["time"].refusals)
    assert plan_for(site(131072), passes=PASSES).method == "xattention"  # without one, order is preference
    assert plan_for(site(131072), passes=["dense", "xattention"], objective="time").method == "xattention"
    memory = plan_for(site(131072), passes=["xattention", "dense"], objective="memory")
    assert (memory.method, memory.scratch) == ("dense", 0)


def test_a_method_beyond_the_error_is_refused_with_both_numbers(plan_file):
    file = plan_file(("xattention", {}, 0.08), ("sink_window", {"window": 512}, 0.01))
    decision = plan_for(site(131072), plan=file, max_error=0.05)
    assert decision.method == "dense"
    assert decision.refusals[0] == "xattention: measured error 0.08 exceeds max_error 0.05"
    decision = plan_for(site(131072), plan=file, max_error=0.1)
    assert (decision.method, decision.error) == ("xattention", 0.08)
    assert "error 0.08, at most 0.1" in decision.reason


def test_an_error_holds_for_the_options_that_it_was_measured_with(plan_file):
    file = plan_file(("xattention", {"stride": 16}, 0.01))
    decision = plan_for(site(131072), plan=file, max_error=0.05)
    assert (decision.method, decision.options["stride"], decision.error) == ("xattention", 16, 0.01)
    assert decision.refusals[0].startswith("xattention: the plan has no measured error for it here (")
    decision = plan_for(site(131072), plan=file, max_error=0.001)
    assert decision.method == "dense"
    reason = (
        "xattention: measured error 0.01 exceeds max_error 0.001 with stride = 16, estimate = ['pair', 'int8', 'peak'], refine_stride = "
    )
    assert decision.refusals[1] == reason + "None"


def test_a_plan_without_bound_or_objective_decides_alone(plan_file):
    file = plan_file(("sink_window", {}, 0.0))
    assert plan_for(site(131072), passes=["sink_window"], plan=file).method == "xattention"
    assert plan_for(site(131072), passes=["sink_window"], plan=file, max_error=0.1).method == "sink_window"


def test_the_objective_takes_the_cheapest_of_what_the_error_allows(plan_file):
    file = plan_file(("xattention", {"stride": 8}, 0.01), ("xattention", {"stride": 16}, 0.04), ("sink_window", {}, 0.3))
    common = {"passes": PASSES, "plan": file, "objective": "time"}
    assert plan_for(site(131072), **common, max_error=0.5).method == "sink_window"
    loose, strict = (plan_for(site(131072), **common, max_error=bound) for bound in (0.05, 0.02))
    assert (loose.options["stride"], strict.options["stride"]) == (16, 8)
    assert plan_for(site(131072), **common, max_error=0.001).method == "dense"
    assert len(strict.measured) == 3  # kept for later choices


def test_exact_methods_need_no_measurement(plan_file):
    decision = plan_for(site(131072), passes=["dense"], plan=plan_file(), objective="time", max_error=0.0)
    assert (decision.method, decision.error) == ("dense", 0.0)


def test_an_error_without_a_plan_is_a_mistake():
    with pytest.raises(ConfigError, match="max_error: needs a plan file with measured errors"):
        plan_for(site(), max_error=0.1)


def test_the_measured_errors_survive_a_round_trip():
    plan = measured(("xattention", {"stride": 8}, 0.25))
    assert Plan.from_json(plan.to_json()).decisions[0].measured == plan.decisions[0].measured
    old = plan.to_json().replace('"measured"', '"unknown"')
    with pytest.raises(Exception, match="not a plan file"):
        Plan.from_json(old)


@pytest.mark.parametrize("goal", ["time", "memory", "balanced"])
def test_nothing_is_chosen_that_costs_more_than_a_rival_in_every_respect(goal):
    """Dominated candidates never win, at any length."""
    settings = config.load({"passes": PASSES, "objective": goal}, method_models=registry.discover(), environ={})
    context = Context(H200, "triton")
    for length in (2048, 16384, 131072, 1 << 20):
        one = site(length)
        _, (choice,) = make_plan([one], settings, context)
        rivals = [p for m in (XAttention(), SinkWindow(), Dense()) for p in _all(m.propose(one, context)) if p.min_key_len <= length]
        cost = lambda p: (float(p.seconds), float(p.scratch))
        assert not any(all(x < y for x, y in zip(cost(r), cost(choice.proposal), strict=True)) for r in rivals)
        assert math.isfinite(choice.decision.seconds)


def _all(answer) -> list:
    found = answer if isinstance(answer, tuple) else (answer,)
    return [dataclasses.replace(p) for p in found if isinstance(p, method.Proposal)]
