"""Sites that share a module path: each keeps its own decision, rule, error and name, in plans that are saved and loaded too."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import sparsify
from sparsify import testing
from sparsify.api import collect_plans
from sparsify.commands.calibrate import errors as calibrate_errors
from sparsify.errors import ConfigError, PlanError
from sparsify.matching.base import Site
from sparsify.planning.decision import Decision, Place, labels, places
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import SavedPlan

WINDOW = {"sinks": 1, "window": 3}
X = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Attend(torch.nn.Module):
    def forward(self, x, y):
        return F.scaled_dot_product_attention(x, y, y, is_causal=True)


class Tied(torch.nn.Module):
    """One layer called three times, as ALBERT does."""

    def __init__(self):
        super().__init__()
        self.attention = Attend()

    def forward(self, x):
        first = self.attention(x, x)
        second = self.attention(first, first)
        return first, second, self.attention(second, second)


class SelfAndCross(torch.nn.Module):
    """Two attentions in one module."""

    def forward(self, x):
        first = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return first, F.scaled_dot_product_attention(first, x + 1, x, is_causal=True)


def function(x):
    first = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return first, F.scaled_dot_product_attention(first, first, first, is_causal=True)


def run(model, x=X, **options):
    with torch.no_grad(), collect_plans() as plans:
        out = torch.compile(model, backend="sparsify", options={"min_length": 0, "strict": True, "lower": "eager", **options})(x)
    torch._dynamo.reset()
    return out, plans[-1]


def lossy(model):
    return run(model, passes=["sink_window"], sink_window=WINDOW)


@pytest.mark.parametrize("make", [Tied, SelfAndCross, lambda: function])
@pytest.mark.parametrize("spared", [0, 1])
def test_a_saved_plan_tells_sites_of_one_path_apart(make, spared, tmp_path):
    model = make()
    everywhere, plan = lossy(model)
    assert [d.ordinal for d in plan.decisions] == list(range(len(everywhere)))
    plan.decisions[spared].method, plan.decisions[spared].options = None, {}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    got, followed = run(model, plan=str(tmp_path / "plan.json"))
    assert [d.method for d in followed.decisions] == [d.method for d in plan.decisions]
    exact = model(X)
    if spared == 0:
        torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(got[0], everywhere[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[1], everywhere[1], rtol=1e-2, atol=1e-2)


def test_the_order_in_the_file_does_not_matter(tmp_path):
    _, plan = lossy(Tied())
    plan.decisions[0].method, plan.decisions[0].options = None, {}
    plan.decisions.reverse()
    plan.save(tmp_path / "plan.json")
    _, followed = run(Tied(), plan=str(tmp_path / "plan.json"))
    assert [d.method for d in followed.decisions] == [None, "sink_window", "sink_window"]


def test_a_plan_of_another_number_of_sites_is_ambiguous(tmp_path):
    _, plan = lossy(Tied())
    plan.decisions[0].method, plan.decisions[0].options = None, {}
    plan.decisions.pop()
    plan.save(tmp_path / "plan.json")
    with pytest.raises(Exception, match="ambiguous: 2 decisions for site attention, of which the graph has 3"):
        run(Tied(), plan=str(tmp_path / "plan.json"))


def decision(site="a", ordinal=0, **changes):
    found = Decision(site, None, "prefill", {}, "", "sink_window", dict(WINDOW), ordinal=ordinal)
    return Decision(**{**vars(found), **changes})


def test_which_entry_serves_which_site():
    same = SavedPlan(Plan([decision(), decision()]), "p")  # two graphs, or a file of an older version: nothing to tell apart
    assert same.find(Place("attention", "a", 2, 3)).method == "sink_window"
    for entries in ([decision()], [decision(), decision(ordinal=1, method=None, options={})]):
        with pytest.raises(PlanError, match="ambiguous"):
            SavedPlan(Plan(entries), "p").find(Place("attention", "a", 2, 3))
    with pytest.raises(PlanError, match="the plan has no entry for site a#1"):
        SavedPlan(Plan([decision("b")]), "p").find(Place("attention", "a", 1, 2))
    with pytest.raises(PlanError, match="no entry for site a "):
        SavedPlan(Plan([decision()]), "p").find(Place("ffn", "a"))


@pytest.mark.parametrize("change", [{"method": None, "options": {}}, {"options": {"sinks": 2}}, {"measured": [{}]}])
def test_two_decisions_for_one_site_are_refused_at_once(change, tmp_path):
    if change.get("measured"):
        change = {"measured": [{"method": "sink_window", "options": WINDOW, "error": 0.5}]}
    Plan([decision(), decision(**change)]).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="ambiguous: two decisions for site a#0 differ"):
        sparsify.compile(Tied(), plan=str(tmp_path / "plan.json"))


def test_places_count_by_kind_and_path():
    class Named(Site):
        kind = "attention"

        def __init__(self, name):
            self.name = name

    found = places([Named("a"), Named("b"), Named("a")])
    assert [(p.ordinal, p.count, str(p)) for p in found] == [(0, 2, "a#0"), (0, 1, "b"), (1, 2, "a#1")]


def test_rules_may_name_one_of_them():
    rules = lambda *layers: [{"layers": list(layers), "method": "sink_window", **WINDOW}]
    methods = lambda model, *layers: [d.method for d in run(model, passes=[], rules=rules(*layers))[1].decisions]
    assert methods(Tied(), "attention") == ["sink_window"] * 3
    assert methods(Tied(), "attention#1") == [None, "sink_window", None]
    assert methods(Tied(), "att*#0", "*#2") == ["sink_window", None, "sink_window"]
    assert methods(function, "#1") == [None, "sink_window"]
    assert methods(Tied(), "*1") == [None] * 3  # a number is not part of the path


def test_reports_name_them_apart():
    _, plan = lossy(Tied())
    assert labels(plan.decisions) == ["attention#0", "attention#1", "attention#2"]
    plan.decisions[1].reason = "another"
    assert "attention#0" in str(plan) and "attention#1" in str(plan)
    assert labels([decision("x")]) == ["x"]


class Named(Tied):
    def forward(self, input_ids, use_cache=False):
        return super().forward(input_ids)[-1]


def test_calibrated_errors_belong_to_one_of_them():
    model = Named()
    errors = calibrate_errors.measure(model, X, {"passes": ["sink_window"], "sink_window": WINDOW}, chunk=2)
    found = [errors.measured_at("attention", ordinal)[0]["error"] for ordinal in range(3)]
    assert len(set(found)) == 3 and errors.measured_at("attention", 3) == []
    plan = calibrate_errors.plan_for(model, X, {"passes": ["sink_window"], "sink_window": WINDOW, "min_length": 0}, errors)
    assert [d.measured[0]["error"] for d in plan.decisions] == found
    again = calibrate_errors.plan_for(model, X, {"passes": ["dense"], "min_length": 0}, calibrate_errors.Errors(), plan)
    assert [d.measured[0]["error"] for d in again.decisions] == found


def test_an_error_that_is_no_number_is_not_recorded():
    errors = calibrate_errors.Errors()
    method = sparsify.planning.registry.discover()["sink_window"]()
    errors.add(0, Place("attention", "a"), method, torch.ones(2), torch.tensor([1.0, torch.nan]))
    errors.add(0, Place("attention", "b"), method, torch.zeros(2), torch.ones(2))
    errors.add(0, Place("attention", "c"), method, torch.ones(2), torch.full((2,), 1.5))
    errors.add(1, Place("attention", "c"), method, torch.ones(2), torch.full((2,), 3.0))
    assert (errors.measured_at("a"), errors.measured_at("b"), errors.measured_at("c")[0]["error"]) == ([], [], 2.0)


def test_the_search_for_a_difference_names_one_of_them():
    found, _ = testing.bisect(
        Named(), {"input_ids": X}, options={"passes": ["sink_window"], "sink_window": WINDOW, "min_length": 0, "lower": "eager"}
    )
    assert (found.kind, found.site) == ("site", "attention#0")
    assert found.options["rules"][0]["layers"] == ["attention#0"]


BROKEN = {
    "cut": ('{"format": 1, "deci', "not a plan file: Unterminated string"),
    "list": ("[]", "not a plan file: must be a table"),
    "no format": ('{"decisions": []}', "needs the key 'format'"),
    "another format": ('{"format": 2, "decisions": []}', "plan of format 2 .*reads format 1"),
    "no decisions": ('{"format": 1}', "needs the key 'decisions'"),
    "a number": ('{"format": 1, "decisions": 3}', "decisions: must be a list, not 3"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8 text"),
    "deep": ("[" * 100000, "not a plan file"),
}
CHANGES = {
    "unknown key": ({"methode": None}, r"decisions\[0\].methode: unknown key \(did you mean 'method'\?\)"),
    "wrong type": ({"layer": "3"}, r"decisions\[0\].layer: must be an integer, not '3'"),
    "wrong word": ({"kind": "attn"}, r"decisions\[0\].kind: must be 'attention', 'ffn', 'stream', 'batch' or 'token'"),
    "a list of numbers": ({"refusals": [1]}, r"decisions\[0\].refusals\[0\]: must be a string, not 1"),
    "NaN": ({"seconds": float("nan")}, "NaN is not a number"),
    "infinity": ({"options": {"window": float("inf")}}, "Infinity is not a number"),
    "measured": ({"measured": [{"method": "sink_window", "options": {}}]}, r"decisions\[0\].measured\[0\]: needs the key 'error'"),
    "measured more": ({"measured": [{"method": "x", "options": {}, "error": 0.1, "by": 1}]}, r"measured\[0\].by: unknown key"),
    "no method": ({"method": "sink_windw"}, r"decisions\[0\]: unknown method 'sink_windw' \(did you mean 'sink_window'\?\)"),
    "no option": ({"options": {"windw": 3}}, r"decisions\[0\].options.windw: unknown key \(did you mean 'window'\?\)"),
    "out of range": ({"options": {"window": -1}}, r"decisions\[0\].options.window"),
    "another kind": ({"kind": "ffn"}, "sink_window is no method for ffn sites"),
    "unmeasurable": ({"measured": [{"method": "no", "options": {}, "error": 0.1}]}, r"measured\[0\]: unknown method 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BROKEN, *CHANGES])
def test_a_broken_plan_file_is_an_error_at_once(case, tmp_path):
    path = tmp_path / "plan.json"
    if case in BROKEN:
        text, message = BROKEN[case]
    else:
        change, message = CHANGES[case]
        data = json.loads(Plan([decision()]).to_json())
        data["decisions"][0].update(change)
        text = json.dumps(data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=message) as found:
        sparsify.compile(Tied(), plan=str(path))
    assert str(path) in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(PlanError, match=message):
        sparsify.explain(Tied(), options={"plan": str(path)}, x=X)


def test_a_plan_file_that_is_away_is_an_error_at_once(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        sparsify.compile(Tied(), plan=str(tmp_path / "plan.json"))


def test_a_broken_plan_on_the_other_road_is_one_warning(tmp_path, recwarn, caplog):
    (tmp_path / "plan.json").write_text("[]")
    model = Tied()
    model.compile(backend="sparsify", options={"plan": str(tmp_path / "plan.json"), "lower": "eager"})
    with torch.no_grad():
        got = model(X)
    assert torch.equal(got[0], model.attention(X, X))
    said = [str(w.message) for w in recwarn if "sparsify" in str(w.message)]
    assert len(said) == 1 and "not a plan file: must be a table" in said[0] and "\n" not in said[0]
    assert not [r for r in caplog.records if r.exc_info or r.levelname in ("WARNING", "ERROR")]


def test_costs_without_a_bound_are_saved_as_unknown(tmp_path):
    plan = Plan([decision(seconds=float("inf"), dense_seconds=float("nan"))])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").decisions[0].seconds is None
