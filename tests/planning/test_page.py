"""What a plan's page shows, and that nothing of a model runs on it."""

from __future__ import annotations

import html
import json
import math
import re

import pytest
import torch

import sparsify
from sparsify.planning.page import data
from sparsify.planning.plan import Plan
from tests.support import plans
from tests.support.tiny_models import build


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plans.plan(layers=14, heads=4, length=4096)


def maps_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="maps">(.*?)</script>', text, re.DOTALL)[1])


def test_every_site_is_a_row_with_its_reasons(plan):
    rows = data.page(plan).rows
    assert [row.label for row in rows] == [d.site for d in plan.decisions]
    assert [row.state for row in rows].count("left") == 1 and rows[9].choice == "left as is"
    assert rows[9].reason.startswith("the mask cannot be read") and rows[9].refusals == (f"xattention: {plans.HOSTILE}",)
    assert rows[0].refusals == ("xattention: rule 0 names other methods for layers 0-1",)
    assert [cost.name for cost in rows[3].costs] == ["dense", "xattention"] and "hopper/lists" in rows[3].costs[1].formula
    assert ("validation", "agrees on 12 instances") in rows[3].facts and ("scratch memory", "42 MB") in rows[3].facts
    assert rows[3].gain == f"{13.1 / 3.43:.2f}×" and rows[12].density == "≈24%" and rows[-1].kind == "ffn"
    assert data.page(plan).kinds == ("attention", "ffn")


def test_parts_add_up_to_the_call(plan):
    page = data.page(plan)
    parts = {part.name: part for part in page.parts}
    attention = [d for d in plan.decisions if d.kind == "attention"]
    assert list(parts) == ["attention", *plan.beside]
    assert math.isclose(parts["attention"].dense, 14 * 1.31e-2)
    assert math.isclose(parts["attention"].chosen, sum(d.dense_seconds if d.method is None else d.seconds for d in attention))
    assert math.isclose(parts["feed-forward"].chosen - parts["feed-forward"].dense, 0.5e-3)
    assert page.total is not None and math.isclose(page.total.dense, sum(part.dense for part in page.parts))
    assert max(max(part.width_dense, part.width_chosen) for part in page.parts) == 100


def test_densities_are_by_head_where_they_were_recorded(plan):
    heat = data.page(plan).heat
    assert [row.name for row in heat] == [str(layer) for layer in range(14)]
    recorded = [row for row in heat if row.heads]
    assert [row.map for row in recorded] == list(range(10)) and all(len(row.heads) == 4 for row in recorded)
    assert recorded[0].heads == tuple(round(100 * one, 2) for one in plan.block_maps["model.layers.2.self_attn"].density)
    assert (heat[0].whole, heat[9].whole, heat[12].whole) == ("all blocks", "all blocks", "≈24% expected by sink_window")


def test_maps_are_digits_by_cell(plan):
    found = maps_of(plan.to_html())["sites"]
    assert [site["label"] for site in found] == list(plan.block_maps)
    for site, source in zip(found, plan.block_maps.values(), strict=True):
        shares = source.shares(data.SIDE)
        assert (site["rows"], site["columns"]) == shares.shape[1:] and len(site["heads"]) == 4
        for head, digits in zip(shares.flatten(1).tolist(), site["heads"], strict=True):
            assert [digit == data.NOTHING for digit in digits] == [math.isnan(share) for share in head]
            pairs = [(share, int(digit, 16)) for share, digit in zip(head, digits, strict=True) if digit != data.NOTHING]
            assert all(abs(share - level / 15) <= 1 / 15 for share, level in pairs)
            assert all(((share == 0), (share == 1)) == ((level == 0), (level == 15)) for share, level in pairs)


def test_many_maps_are_coarser_and_the_page_stays_small(monkeypatch, plan):
    monkeypatch.setattr(data, "CELLS", 40 * 16 * 16)
    found = data.maps_data(plan.block_maps)["sites"]
    assert {(site["rows"], site["columns"]) for site in found} == {(16, 16)}
    assert sum(len(digits) for site in found for digits in site["heads"]) == data.CELLS


def test_nothing_from_a_model_is_markup(plan):
    text = plan.to_html(title=plans.HOSTILE)
    assert plans.HOSTILE not in text and "<img" not in text and "49" not in re.search("<h1>.*?</h1>", text, re.DOTALL)[0]
    assert html.unescape(re.search("<h1>(.*?)</h1>", text, re.DOTALL)[1]) == plans.HOSTILE
    hostile = Plan(fallback=plans.HOSTILE, device=plans.HOSTILE, block_maps={plans.HOSTILE: next(iter(plan.block_maps.values()))})
    text = hostile.to_html()
    assert plans.HOSTILE not in text and "<img" not in text and text.count("<script") == 2
    assert [site["label"] for site in maps_of(text)["sites"]] == [plans.HOSTILE]


def test_the_page_needs_no_network(plan):
    text = plan.to_html()
    assert "default-src 'none'" in text
    assert not re.search(r"""https?://|@import|url\(|<[^>]*\s(?:src|href)=(?!"#|"data:,")""", text)


def test_an_empty_plan_has_a_page():
    assert "No site was found" in Plan().to_html()


@torch.no_grad()
def test_explain_records_maps_and_the_rest_of_the_call(tmp_path):
    options = {"passes": ["xattention", "dense"], "min_length": 0, "strict": True, "xattention": {"block": 64, "density": 0.5}}
    found = sparsify.explain(build("llama"), input_ids=torch.arange(3, 303)[None] % 100 + 3, use_cache=False, options=options)
    assert len(found.rewritten) == len(found.block_maps) == 2
    for decision, one in zip(found.decisions, found.block_maps.values(), strict=True):
        assert decision.realised_density == sum(one.density) / 4 and 0 < decision.realised_density < 1
        assert one.visited.shape == (4, 5, 5)
    assert all(seconds > 0 for seconds in found.beside.values())
    for name in ("report.html", "plan.json"):
        found.save(tmp_path / name)
    assert len(maps_of((tmp_path / "report.html").read_text())["sites"]) == 2
    again = Plan.load(tmp_path / "plan.json")
    assert again == found and not again.block_maps and "all parts" in again.to_html()
