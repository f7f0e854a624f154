"""Facts and questions as word pieces: what is asked was told before, and the codes say which tokens are answers."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from benchmarks.lib import corpus, needles, recall

SOURCE = needles.stdlib_text(300_000).decode(errors="ignore")


@pytest.fixture(scope="module")
def maker() -> recall.Maker:
    tokenizer = corpus.train_tokenizer(iter([SOURCE]), 1024)
    return recall.Maker(tokenizer, np.array(tokenizer.encode(SOURCE).ids, np.uint16), corpus.words([SOURCE], 500))


def told(maker: recall.Maker, ids: np.ndarray, codes: np.ndarray) -> list[tuple[str, str]]:
    """For each answer: the text before it, and the answer."""
    decode = maker.tokenizer.decode
    return [(decode(ids[:start].tolist()), decode(ids[start : start + size].tolist())) for start, size in recall.answers(codes)]


@pytest.mark.parametrize("task", recall.WEIGHTS)
@pytest.mark.parametrize("length", [1024, 3001])
def test_sequences_have_the_length_and_depend_on_the_seed(maker: recall.Maker, task: str, length: int) -> None:
    ids, codes = maker.make(random.Random(1), task, length)
    again, _ = maker.make(random.Random(1), task, length)
    other, _ = maker.make(random.Random(2), task, length)
    assert len(ids) == len(codes) == length
    assert ids.max() < 1024
    assert (ids == again).all() and not (ids == other).all()
    assert (codes == recall.ANSWER).any() == (task != "text")


@pytest.mark.parametrize("task", ["facts", "magic"])
def test_answers_were_told_before(maker: recall.Maker, task: str) -> None:
    asked = 0
    for seed in range(12):
        for before, answer in told(maker, *maker.make(random.Random(seed), task, 1500)):
            # random values do not stand in the text by chance, short numbers may
            assert answer in before, (answer, before[-100:])
            asked += len(answer) > 4
    assert asked > 30


@pytest.mark.parametrize("form", [*recall.FORMS, *recall.HELD_OUT_FORMS])
def test_every_wording_is_asked_for_in_its_words(maker: recall.Maker, form: str) -> None:
    forms = recall.FORMS | recall.HELD_OUT_FORMS
    units = maker.facts(random.Random(3), 1024, {form: forms[form]}, "end")
    ids, codes = maker.assemble(random.Random(3), 1024, [], units, "text")
    found = told(maker, ids, codes)
    assert found
    for before, answer in found:
        assert any(re.split(r"\{\w\}", ask)[-2].strip(" \n\"'>") in before[-80:] for ask in forms[form].asks)
        assert answer.strip() == answer


def test_variables_hold_what_their_chain_began_with(maker: recall.Maker) -> None:
    for seed in range(6):
        _, units, kind = maker.chains(random.Random(seed), 1500, code=True)
        for before, answer in told(maker, *maker.assemble(random.Random(seed), 1500, [], units, kind)):
            name = re.findall(r"\w+", before)[-1]
            assigned = dict(re.findall(r"\n(\w+) = (\w+)\n", before))
            while not name.isdigit():
                name = assigned[name]
            assert name == answer


def test_lists_name_the_words_that_come_most_often(maker: recall.Maker) -> None:
    ids, codes = maker.make(random.Random(5), "common", 2000)
    ((before, answer),) = told(maker, ids, codes)
    listed = re.findall(r"\d+\. ([a-z]+)", before)
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert {word for _, word in counts[:10]} == set(re.findall(r"[a-z]+", answer))
    assert counts[9][0] > counts[10][0]


def test_codes_follow_spans_of_characters(maker: recall.Maker) -> None:
    line = recall.render("the code of {k} is {v}.\n", k=("lantern", recall.NOISE), v=("12345", recall.ANSWER))
    ((ids, codes),) = maker.encode([line])
    assert maker.tokenizer.decode(ids[codes == recall.ANSWER].tolist()) == "12345"
    assert maker.tokenizer.decode(ids[codes == recall.NOISE].tolist()).strip() == "lantern"
    assert (codes == recall.ANSWER).sum() == 5  # a token a digit


def test_answers_are_runs_of_their_code() -> None:
    codes = np.array([2, 2, 0, 1, 2, 1, 2, 2, 2], np.uint8)
    assert recall.answers(codes) == [(0, 2), (4, 1), (6, 3)]
    assert recall.answers(np.zeros(4, np.uint8)) == []


def test_batches_mix_tasks(maker: recall.Maker) -> None:
    ids, codes = maker.batch(7, 6, 400)
    assert ids.shape == codes.shape == (6, 400)
    assert ids.dtype == np.uint16 and set(np.unique(codes)) == {recall.NOISE, recall.TEXT, recall.ANSWER}
