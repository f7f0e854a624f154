"""Prompts of the small models: questions at the same places in each, every answer told before, and questions that are listed first."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.lib import corpus, needles, subjects
from sparsify.commands.eval.needles import rows_right_by_turn

SOURCE = needles.stdlib_text(300_000).decode(errors="ignore")


@pytest.fixture(scope="module")
def pieces() -> subjects.Pieces:
    return subjects.Pieces.of(corpus.train_tokenizer(iter([SOURCE]), 1024), SOURCE)


def test_word_pieces_ask_at_the_same_places(pieces: subjects.Pieces) -> None:
    items = [pieces.prompt(900, seed, 6, 3) for seed in range(4)]
    assert len({(item.answers, item.questions) for item in items}) == 1
    assert not torch.equal(items[0].ids, items[1].ids) and torch.equal(items[0].ids, pieces.prompt(900, 0, 6, 3).ids)
    decode = pieces.maker.tokenizer.decode
    for item in items:
        ids = item.ids[0].tolist()
        assert len(ids) == 900 and len(item.answers) == 3
        context = decode(ids[: item.questions[0]])
        assert context.count("The value of ") >= 6
        for (start, size), question in zip(item.answers, item.questions, strict=True):
            value, asked = decode(ids[start : start + size]).strip(), decode(ids[question:start])
            key = asked.split("What is the value of ")[1].split("?")[0]
            assert f"The value of {key} is {value}." in context
    with pytest.raises(ValueError, match="no room"):
        pieces.prompt(200, 0, 12, 12)


def test_listed_questions_stand_behind_the_context(pieces: subjects.Pieces) -> None:
    for make in (
        lambda length, seed: pieces.prompt(length, seed, 6, 3),
        lambda length, seed: needles.prompt(length, SOURCE.encode(), seed, 6, 3),
    ):
        plain, item = make(900, 1), subjects.listed(make, 900, 1)
        assert item.ids.shape == (1, 900)
        question = lambda one, turn: one.ids[0, one.questions[turn] : one.answers[turn][0]].tolist()
        asked = [question(plain, turn) for turn in range(3)]
        whole = question(item, 0)
        assert whole == [*asked[0], *asked[1], *asked[2], *asked[0]]
        assert [question(item, turn) for turn in (1, 2)] == asked[1:]
        for (start, size), (before, _) in zip(item.answers, plain.answers, strict=True):
            assert item.ids[0, start : start + size].tolist() == plain.ids[0, before : before + size].tolist()


def test_rows_are_asked_together(pieces: subjects.Pieces) -> None:
    items = [pieces.prompt(600, seed, 4, 2) for seed in range(3)]
    ids, fed = torch.cat([item.ids for item in items]), [0]

    def feed(some: torch.Tensor) -> torch.Tensor:
        after = torch.nn.functional.pad(ids[:, fed[0] + 1 :], (0, 1))[:, : some.shape[1]].clone()
        fed[0] += some.shape[1]
        if fed[0] > items[0].answers[1][0]:
            after[1] = 0  # the second row forgets the second answer
        return torch.nn.functional.one_hot(after, 1024).float()

    assert [turn.tolist() for turn in rows_right_by_turn(feed, items)] == [[True] * 3, [True, False, True]]
    with pytest.raises(ValueError, match="different places"):
        next(iter(rows_right_by_turn(feed, [items[0], pieces.prompt(610, 0, 4, 2)])))
