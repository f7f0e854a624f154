"""A long prompt of code with facts in it and questions at its end, and for each what is asked, what is true and where it was told."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.lib import recall

FORMS = ("assign", "value", "remember")  # wordings of benchmarks.lib.recall


@dataclass(frozen=True)
class Question:
    """A question at the prompt's end.

    key: what is asked for. text: the question up to its answer, on one line. value: the true answer.
    fact: token at which the value was told. start, size: tokens of the answer.
    """

    key: str
    text: str
    value: str
    fact: int
    start: int
    size: int


@dataclass(frozen=True)
class Prompt:
    """ids: int64 [1, length]. codes: uint8 [length], as in benchmarks.lib.recall. questions: in the prompt's order."""

    ids: torch.Tensor
    codes: np.ndarray
    questions: list[Question]

    @property
    def kept(self) -> int:
        """How many logits from the end on the questions need."""
        return self.ids.shape[1] - self.questions[0].start + 1

    def guesses(self, logits: torch.Tensor) -> list[list[int]]:
        """What logits [1, last tokens, vocabulary] say where the answers stand."""
        left_out = self.ids.shape[1] - logits.shape[1]
        tokens = logits[0].argmax(-1)
        return [tokens[one.start - 1 - left_out :][: one.size].tolist() for one in self.questions]

    def right(self, logits: torch.Tensor) -> list[bool]:
        """Which answers are right."""
        truth = [self.ids[0, one.start : one.start + one.size].tolist() for one in self.questions]
        return [guess == true for guess, true in zip(self.guesses(logits), truth, strict=True)]

    def nll(self, logits: torch.Tensor) -> float:
        """NLL, in nats a token, of text among the last tokens: neither answers nor what nobody can foresee."""
        left_out = self.ids.shape[1] - logits.shape[1]
        text = torch.from_numpy(self.codes[left_out + 1 :] == recall.TEXT)
        return F.cross_entropy(logits[0, :-1][text].float(), self.ids[0, left_out + 1 :][text]).item()


def prompt(maker: recall.Maker, length: int, seed: int, facts: int, asks: int) -> Prompt:
    """`length` tokens of the maker's text with `facts` facts, of which `asks` are asked for at the end.

    Raises:
        ValueError: the facts do not fit, or more is asked for than told.
    """
    if not 0 < asks <= facts:
        raise ValueError(f"{asks} questions about {facts} facts")
    rng = random.Random(seed)
    units = []
    about: dict[str, tuple[str, str]] = {}  # by value: key and question
    values = rng.sample(range(10**6, 10**7), facts)  # long enough not to stand in the text by chance
    for number, value in enumerate(map(str, values)):
        form = recall.FORMS[FORMS[number % len(FORMS)]]
        key, noun, ask = maker.key(rng, "identifier"), rng.choice(recall.NOUNS), rng.choice(form.asks)
        noise = {"k": (key, recall.NOISE), "n": (noun, recall.NOISE)}
        told = recall.render(form.fact, v=(value, recall.NOISE), **noise)
        asked = recall.render(ask, v=(value, recall.ANSWER), **noise)
        units.append(recall.Unit([told], [asked] if number < asks else []))
        about[value] = key, " ".join(asked.text[: asked.text.rindex(value)].split())
    ids, codes = maker.assemble(rng, length, [], units, "text")
    spans = recall.answers(codes)
    if len(spans) < asks:
        raise ValueError(f"{length} tokens have room for {len(spans)} of {asks} questions")
    tokens = ids.tolist()
    questions = []
    for start, size in spans:
        answer = tokens[start : start + size]
        value = maker.tokenizer.decode(answer).strip()
        fact = next(at for at in range(length) if tokens[at : at + size] == answer)
        questions.append(Question(*about[value], value, fact, start, size))
    return Prompt(torch.from_numpy(ids.astype(np.int64))[None], codes, questions)
