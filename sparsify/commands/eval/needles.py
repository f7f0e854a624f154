"""Needles in a haystack for byte-level models: prompts, and how to score a model on them.

A prompt of n bytes is text with facts at random places (key: 6 lowercase letters, value: 6 digits) and, at its end, questions with their
answers. Answers are teacher-forced: an answer is right when each of its bytes is the argmax. The random draws follow one fixed order, so
that a (form, length, text, seed, needles, asks) names one prompt on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsify.commands.eval.intervals import wilson

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
NLL_BYTES = 2048  # bytes from the prompt's middle on that the mean negative log-likelihood is taken over
FIRST_SEED = 4242


# How a fact is written and how it is asked for, from a key and a value. needle-14m is trained on "hash" alone; what dense attention does
# not answer in a form says nothing about sparse attention.
FORMS = {
    "hash": (b"\n## %s: %s\n", b"\n?? %s: "),
    "comment": (b"\n# %s: %s\n", b"\n# %s: "),
    "repeat": (b"\n?? %s: %s\n", b"\n?? %s: "),
    "json": (b'\n"%s": "%s",\n', b'\n"%s": "'),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt and where its questions are.

    ids: int64 [1, n]; a token is a byte.
    answers: for each question in order, where its answer lies: (start, length) in bytes.
    questions: where each question begins; the first is where the context ends.
    depths: where in the prompt the fact that is asked for stands, 0 to 1.
    """

    ids: torch.Tensor
    answers: tuple[tuple[int, int], ...]
    questions: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """Answers right out of those asked, and the mean negative log-likelihood of the text in nats a byte."""

    right: int
    asked: int
    nll: float

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.asked)


def _word(rng: np.random.Generator, alphabet: np.ndarray, length: int) -> bytes:
    return alphabet[rng.integers(0, len(alphabet), length)].tobytes()


def prompt(length: int, text: bytes, seed: int, needles: int = 32, asks: int = 16, form: str = "hash") -> Prompt:
    """A prompt of exactly `length` bytes out of `text`. Raises ValueError when facts and questions do not fit or `text` is too short."""
    rng = np.random.default_rng(seed)
    fact_form, question_form = FORMS[form]
    facts, questions = [], []
    for _ in range(needles):
        key, value = _word(rng, LETTERS, 6), _word(rng, DIGITS, 6)
        facts.append(fact_form % (key, value))
        questions.append((question_form % key, value))
    order = rng.permutation(needles)[:asks]
    room = length - sum(map(len, facts)) - sum(len(questions[i][0]) + len(questions[i][1]) + 1 for i in order)
    if room < 0 or len(text) <= room:
        raise ValueError(
            f"a prompt of {length} bytes with {needles} needles and {asks} questions needs 0 <= {room} < {len(text)} bytes of text"
        )
    start = int(rng.integers(0, len(text) - room))
    hay = text[start : start + room]
    body, last = bytearray(), 0
    places = []
    for cut, fact in zip(np.sort(rng.integers(0, max(room, 1), needles)), facts, strict=True):
        body += hay[last:cut]
        places.append(len(body))
        body += fact
        last = int(cut)
    body += hay[last:]
    answers, starts = [], []
    for question, value in (questions[i] for i in order):
        starts.append(len(body))
        body += question
        answers.append((len(body), len(value)))
        body += value + b"\n"
    depths = tuple(places[i] / length for i in order)
    return Prompt(torch.frombuffer(body, dtype=torch.uint8).long()[None], tuple(answers), tuple(starts), depths)


def right_answers(logits: torch.Tensor, item: Prompt) -> list[bool]:
    """For each question of `item`, whether every byte of its answer is the argmax of `logits` [1, n, 256]."""
    guesses = logits[0].argmax(-1).cpu()
    ids = item.ids[0].cpu()
    return [bool((guesses[start - 1 : start - 1 + size] == ids[start : start + size]).all()) for start, size in item.answers]


def right_by_turn(feed: Callable[[torch.Tensor], torch.Tensor], item: Prompt, inside: bool = True) -> Iterator[bool]:
    """The same with one question a turn, each after the answer of the one before.

    Args:
        feed: takes ids [1, tokens] that follow those of the calls before, over one cache, and gives their logits [1, tokens, vocabulary].
        inside: the first call takes the context and the first question, so that a cache that then evicts has seen it; False: the context
            alone.
    """
    return (bool(right[0]) for right in rows_right_by_turn(feed, [item], inside))


def rows_right_by_turn(
    feed: Callable[[torch.Tensor], torch.Tensor], items: Sequence[Prompt], inside: bool = True
) -> Iterator[torch.Tensor]:
    """The same of several prompts, a row each, whose questions and answers stand at the same places.

    Args:
        feed: as above, of ids [prompts, tokens]; of the first call's logits those of its last token suffice.

    Yields:
        bool [prompts] a turn.

    Raises:
        ValueError: the prompts differ in their places.
    """
    first = items[0]
    if any((one.answers, one.questions, one.ids.shape) != (first.answers, first.questions, first.ids.shape) for one in items):
        raise ValueError("prompts of one batch whose questions stand at different places")
    ids = torch.cat([one.ids for one in items])
    ends = (*first.questions[1:], ids.shape[1])
    last = None if inside else feed(ids[:, : first.questions[0]])
    for turn, ((answer, size), start, end) in enumerate(zip(first.answers, first.questions, ends, strict=True)):
        if inside and turn == 0:
            last = feed(ids[:, :answer])
            logits = torch.cat((last[:, -1:], feed(ids[:, answer:end])), 1)
            guesses = logits[:, :size].argmax(-1)
        else:
            guesses = feed(ids[:, start:end])[:, answer - start - 1 : answer - start - 1 + size].argmax(-1)
        yield (guesses == ids[:, answer : answer + size].to(guesses.device)).all(-1)


def text_nll(logits: torch.Tensor, item: Prompt) -> float:
    """Mean negative log-likelihood, in nats a byte, of up to NLL_BYTES bytes from the middle of the prompt on."""
    length = item.ids.shape[1]
    first = length // 2
    last = min(first + NLL_BYTES, length - 1)
    targets = item.ids[0, first + 1 : last + 1].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[0, first:last].float(), targets).item()


@torch.no_grad()
def score(
    forward: Callable[[torch.Tensor], torch.Tensor],
    length: int,
    text: bytes,
    seeds: Iterable[int] = range(FIRST_SEED, FIRST_SEED + 12),
    needles: int = 32,
    asks: int = 16,
    device: str | torch.device = "cpu",
    form: str = "hash",
) -> Score:
    """Scores `forward` (ids [1, n] int64 -> logits [1, n, 256]) on one prompt a seed. Raises ValueError when `seeds` is empty."""
    right = asked = 0
    nlls = []
    for seed in seeds:
        item = prompt(length, text, seed, needles, asks, form)
        logits = forward(item.ids.to(device))
        answers = right_answers(logits, item)
        right, asked = right + sum(answers), asked + len(answers)
        nlls.append(text_nll(logits, item))
    if not nlls:
        raise ValueError("no seeds, no score")
    return Score(right, asked, sum(nlls) / len(nlls))
