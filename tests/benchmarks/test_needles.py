"""The needle evaluator: prompts are what they claim, and only right answers count."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lib import needles

TEXT = bytes(range(32, 127)) * 200


def oracle(ids: torch.Tensor) -> torch.Tensor:
    """Logits of somebody who knows the next byte."""
    return torch.nn.functional.one_hot(ids.roll(-1, 1), 256).float() * 20


@settings(max_examples=40, deadline=None)
@given(length=st.integers(900, 6000), seed=st.integers(0, 1 << 30), count=st.integers(1, 20), asks=st.integers(1, 20))
def test_prompt_has_its_length_and_answers_stand_after_their_facts(length: int, seed: int, count: int, asks: int) -> None:
    item = needles.prompt(length, TEXT, seed, count, asks)
    assert item.ids.shape == (1, length)
    data = bytes(item.ids[0].tolist())
    assert len(item.answers) == min(count, asks)
    for start, size in item.answers:
        key, value = data[start - 8 : start - 2], data[start : start + size]
        fact = b"\n## " + key + b": " + value + b"\n"
        assert data[start - 12 : start] == b"\n?? " + key + b": "
        assert 0 <= data.find(fact) < start


def test_prompt_without_room_for_text_is_all_events() -> None:
    item = needles.prompt(19 * 6, TEXT, 0, needles=4, asks=2)
    assert bytes(item.ids[0].tolist()).count(b"\n## ") == 4


@pytest.mark.parametrize(("length", "text"), [(100, TEXT), (3000, b"short")])
def test_prompt_that_cannot_be_made_is_refused(length: int, text: bytes) -> None:
    with pytest.raises(ValueError, match="needs"):
        needles.prompt(length, text, 0)


def test_seeds_name_prompts_for_good() -> None:
    """Recorded results are comparable only while the random draws keep their order."""
    data = bytes(needles.prompt(4096, TEXT, 4242).ids[0].tolist())
    assert hashlib.sha256(data).hexdigest()[:16] == "095ab04c4eeed235"
    assert data != bytes(needles.prompt(4096, TEXT, 4243).ids[0].tolist())


def test_score_of_the_oracle_and_of_one_wrong_byte() -> None:
    good = needles.score(oracle, 2000, TEXT, range(3))
    assert (good.right, good.asked, good.share) == (48, 48, 1.0)
    assert good.nll < 1e-5

    def careless(ids: torch.Tensor) -> torch.Tensor:
        logits = oracle(ids)
        start, size = needles.prompt(2000, TEXT, 0).answers[5]
        logits[0, start + size - 2] = 0  # the last byte of one answer
        return logits

    assert needles.score(careless, 2000, TEXT, [0]).right == 15


def test_nll_of_a_uniform_guess() -> None:
    for length in (1000, 4096, 6000):
        item = needles.prompt(length, TEXT, 1)
        assert needles.text_nll(torch.zeros(1, length, 256), item) == pytest.approx(math.log(256), rel=1e-5)


def test_score_needs_seeds() -> None:
    with pytest.raises(ValueError, match="seeds"):
        needles.score(oracle, 2000, TEXT, [])


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I, method 3 (score without continuity correction)."""
    for right, asked, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:
        assert needles.wilson(right, asked) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(asked=st.integers(1, 500), data=st.data())
def test_wilson_encloses_the_share(asked: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, asked))
    low, high = needles.wilson(right, asked)
    assert 0 <= low <= right / asked <= high <= 1
    assert high - low < 1


@pytest.mark.parametrize(("right", "asked"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_share(right: int, asked: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        needles.wilson(right, asked)


def test_library_text_is_stable_and_cut() -> None:
    text = needles.stdlib_text(300_000)
    assert len(text) == 300_000
    assert text == needles.stdlib_text(300_000)
    assert text.count(b"def ") > 100


@pytest.mark.parametrize("form", needles.FORMS)
def test_each_form_asks_for_what_it_says(form):
    item = needles.prompt(2000, TEXT, 3, needles=4, asks=2, form=form)
    body = bytes(item.ids[0].tolist())
    for start, size in item.answers:
        key, question = body[:start].split(b"\n")[-1], needles.FORMS[form][1]
        word = key.removeprefix(question.split(b"%s")[0].lstrip(b"\n")).removesuffix(question.split(b"%s")[1])
        assert needles.FORMS[form][0] % (word, body[start : start + size]) in body[: item.answers[0][0]]
