"""The small models that are asked for facts, of bytes and of word pieces, each with the prompts that it understands.

Every prompt of one length has its questions and answers at the same places, so that several of them are rows of one batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.lib import corpus, int8_weights, needles, recall

FORM = "value"  # of recall.FORMS, which all models of word pieces that are bundled or unpacked here answer
_KEYS = "pair"
_DRAWS = 64  # questions out of which the commonest size is taken


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked.

    model: on its device, in eval mode.
    pieces: whether its tokens are word pieces; else they are bytes.
    make: a prompt of exactly so many tokens, by length and seed.
    """

    model: Any
    pieces: bool
    make: Callable[[int, int], needles.Prompt]


def load(folder: Path, text: bytes, device: str, facts: int, asks: int) -> Subject:
    """The model of a folder: one with a tokenizer is one of word pieces. bf16 on GPUs, fp32 elsewhere.

    Args:
        text: that facts are hidden in.
        facts: told in a prompt. asks: of these, asked for at its end, one after the other.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    loaded: Any = (
        int8_weights.load(folder, dtype) if int8_weights.holds(folder) else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    )
    model = loaded.to(device).eval()
    if not (folder / "tokenizer.json").exists():
        return Subject(model, False, lambda length, seed: needles.prompt(length, text, seed, needles=facts, asks=asks))
    pieces = Pieces.of(Tokenizer.from_file(str(folder / "tokenizer.json")), text.decode(errors="ignore"))
    return Subject(model, True, lambda length, seed: pieces.prompt(length, seed, facts, asks))


@dataclass(frozen=True)
class Pieces:
    """Makes prompts of word pieces.

    size: tokens of a question with its answer. answer: where its answer lies within these, (start, tokens).
    """

    maker: recall.Maker
    size: int
    answer: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> Pieces:
        maker = recall.Maker(tokenizer, np.array(tokenizer.encode(text).ids, np.uint16), corpus.words([text], 2000))
        rng = random.Random(0)
        drawn = Counter(_places(maker, _fact(maker, rng)[1]) for _ in range(_DRAWS))
        return cls(maker, *drawn.most_common(1)[0][0])

    def prompt(self, length: int, seed: int, facts: int, asks: int) -> needles.Prompt:
        """Text with `facts` facts, of which `asks` are asked for at the end, in any order.

        Raises:
            ValueError: they do not fit.
        """
        rng = random.Random(seed)
        units = []
        while len(units) < facts:
            told, ask = _fact(self.maker, rng)
            if len(units) >= asks:
                units.append(recall.Unit([told]))
            elif _places(self.maker, ask) == (self.size, self.answer):
                units.append(recall.Unit([told], [ask]))
        ids, codes = self.maker.assemble(rng, length, [], units, "text")
        start, size = self.answer
        questions = tuple(length - (asks - turn) * self.size for turn in range(asks))
        answers = tuple((question + start, size) for question in questions)
        if tuple(recall.answers(codes)) != answers or sum(codes == recall.ANSWER) != asks * size:
            raise ValueError(f"{length} tokens have no room for {facts} facts and {asks} questions")
        return needles.Prompt(torch.from_numpy(ids.astype(np.int64))[None], answers, questions)


def _fact(maker: recall.Maker, rng: random.Random) -> tuple[recall.Line, recall.Line]:
    """A fact as it is told, and the question about it with its answer."""
    form = recall.FORMS[FORM]
    key, value = maker.key(rng, _KEYS), str(rng.randrange(10**6, 10**7))
    told = recall.render(form.fact, k=(key, recall.NOISE), v=(value, recall.NOISE))
    return told, recall.render(form.asks[0], k=(key, recall.NOISE), v=(value, recall.ANSWER))


def _places(maker: recall.Maker, ask: recall.Line) -> tuple[int, tuple[int, int]]:
    """Tokens of a question, and where its answer lies: (start, tokens)."""
    ids, codes = maker.encode([ask])[0]
    return len(ids), recall.answers(codes)[0]


def listed(make: Callable[[int, int], needles.Prompt], length: int, seed: int) -> needles.Prompt:
    """A prompt behind whose context all questions stand without answers, before each is asked again: nobody who chooses tokens by the
    last ones then knows of one question alone."""
    sample = make(length, seed)
    size = sum(answer - question for (answer, _), question in zip(sample.answers, sample.questions, strict=True))
    item = make(length - size, seed)
    first = item.questions[0]
    asked = [item.ids[:, question:answer] for (answer, _), question in zip(item.answers, item.questions, strict=True)]
    return replace(
        item,
        ids=torch.cat((item.ids[:, :first], *asked, item.ids[:, first:]), 1),
        answers=tuple((answer + size, tokens) for answer, tokens in item.answers),
        questions=(first, *(question + size for question in item.questions[1:])),
        depths=(),
    )
