"""Questions that are rows of a batch, and answers that are given at once, get the answers of one question after the other, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.cache import asking, eviction
from benchmarks.cache.asking import ASKED, QUESTION
from benchmarks.lib import needles
from sparsify import policies
from tests.support import retaining_heads
from tests.support.harness import holding

MODEL = Path(__file__).parents[2] / "benchmarks/models/demo"
LENGTH, SHARE, STREAMING = 800, 0.2, ((0,), (), (0, 1), (1,))
NAMES = list(asking.settings(Path("heads"), STREAMING))


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def known(model, tmp_path_factory):
    heads = retaining_heads.write(tmp_path_factory.mktemp("heads") / "heads.safetensors", model.config)
    return asking.settings(heads, STREAMING)


@pytest.fixture(scope="module")
def item():
    return needles.prompt(LENGTH, needles.stdlib_text(40_000), 1, needles=6, asks=2)


@torch.no_grad()
def one_question(model, item, setting, number, asked):
    """Logits of the answer's bytes, one row and one byte at a time, written out."""
    count, end = len(item.answers), item.questions[0]
    cache = setting.cache(model.config, end, int(end * SHARE), end + 64, SHARE)

    def feed(first, size):
        ids = item.ids[:, first : first + size]
        logits = model(ids, **holding(cache)).logits
        cache.observe(logits, ids)
        return logits[:, -1]

    def answer(number):
        start, size = item.answers[number]
        return [feed(start + byte, 1) for byte in range(size - 1)]

    feed(0, end)
    if setting.policy == "clusters":
        cache.prepare()
    if asked == "blind" and cache.every:
        cache.end_turn()
    found = [feed(item.questions[number], QUESTION)]
    if asked != "blind" and cache.every:
        cache.end_turn()
    found += answer(number)
    if asked == "second turn":
        start, size = item.answers[number]
        following = (number + 1) % count
        line = torch.cat((item.ids[:, start + size - 1 : start + size + 1], item.ids[:, item.questions[following] :][:, :QUESTION]), 1)
        assert line[0, 1] == ord("\n")
        logits = model(line, **holding(cache)).logits
        cache.observe(logits, line)
        found = [logits[:, -1], *answer(following)]
    return torch.stack(found, 1)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.samples(3)
def test_a_batch_answers_as_one_question_at_a_time(model, item, known, name):
    setting = known[name]
    found = asking.ask(model, item, setting, SHARE)
    assert set(found.logits) == set(ASKED) == set(found.kept)
    for asked in ASKED:
        want = torch.stack([one_question(model, item, setting, number, asked) for number in range(2)])
        torch.testing.assert_close(found.logits[asked], want, rtol=1e-3, atol=2e-4)
    everything = name in ("full", *asking.READ)
    # of layers that all stream duo keeps less than it may
    assert found.kept["blind"] == pytest.approx(1.0) if everything else 0.13 < found.kept["blind"] < SHARE + 0.003
    dense = model(item.ids[:, : item.answers[0][0]], use_cache=False).logits[0, -1]
    exact = setting.selects or name in ("full", "pages")  # whose question is asked before anything goes
    assert torch.allclose(found.logits["end"][0, 0], dense, rtol=1e-3, atol=1e-3) == exact
    if name != "full":
        steps = asking.ask(model, item, known["full"], 1.0).logits["blind"]
        assert not torch.allclose(found.logits["blind"], steps, atol=1e-2)


def test_every_policy_is_asked():
    missing = set(policies.discover()) - {setting.policy for setting in asking.settings(Path("heads"), STREAMING).values()}
    assert not {name for name in missing if policies.discover()[name].__module__.startswith("sparsify.")}


def test_a_row_is_right_where_all_its_bytes_are(item):
    answers = torch.stack([item.ids[0, start : start + size] for start, size in item.answers])
    logits = torch.nn.functional.one_hot(answers, 256).float()
    logits[1, 2] = 0
    found = asking.Found({"end": logits, "second turn": logits.roll(-1, 0)}, {})
    assert asking.right(found, item) == {"end": [True, False], "second turn": [False, True]}


def test_half_of_the_heads_stream_and_none_that_look_far(model, item):
    eager = lambda: LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    plan = asking.streaming_heads(eager, item)
    assert len(plan) == 4 and sum(map(len, plan)) == 4
    rows = eager()(item.ids, output_attentions=True, use_cache=False).attentions
    looks = {}
    for layer, weights in enumerate(rows):
        for head in range(2):
            means = []
            for query in (2 * head, 2 * head + 1):
                far = [float(weights[0, query, row, 16 : row - 63].sum()) for row in range(item.questions[0], LENGTH)]
                means.append(sum(far) / len(far))
            looks[layer, head] = max(means)
    streams = {(layer, head) for layer, heads in enumerate(plan) for head in heads}
    assert max(looks[one] for one in streams) <= min(look for one, look in looks.items() if one not in streams)


@pytest.mark.slow
def test_a_cell_is_recorded_in_each_way_it_was_asked(tmp_path):
    (tmp_path / "text").write_bytes(needles.stdlib_text(40_000))
    where = ["--model", str(MODEL), "--text", str(tmp_path / "text"), "--device", "cpu", "--out", str(tmp_path / "out")]
    short = ["--lengths", "1536", "--shares", "0.3", "--questions", "1", "--bytes", "1100", "--window", "300", "--stretch", "500"]
    assert eviction.main(["answers", "stream", *where, *short, "--policies", "knorm", "streaming_llm"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(r["policy"], r["positions"], len(r["nll"])) for r in found[:4]] == [
        ("knorm", "absolute", 2),
        ("streaming_llm", "absolute", 2),
        ("streaming_llm", "recomputed", 2),
        ("streaming_llm", "in_cache", 2),
    ]
    assert [(r["policy"], r["asked"], r["questions"]) for r in found[4:]] == [(n, a, 16) for n in ("knorm", "streaming_llm") for a in ASKED]
    assert all(abs(r["kept"] - 0.3) < 0.01 for r in found[4:])
    # 1100 bytes through 304: what is forgotten is told apart from what a text without a cache has
    assert found[0]["nll"] != found[2]["nll"]
