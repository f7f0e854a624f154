"""Needles in a haystack for byte-level models: prompts, and how to score a model on them.

A prompt of n bytes is text with facts ``\\n## key: value\\n`` at random places (key: 6 lowercase letters, value: 6 digits) and, at its end,
questions ``\\n?? key: value\\n``, or facts and questions of another form (`FORMS`). Answers are teacher-forced in
one prefill: an answer is right when each of its bytes is the argmax.
The random draws follow one fixed order, so that a (length, text, seed, needles, asks) names one prompt on every machine.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
# how a fact is written and how it is asked for, from a key and a value; the models are trained on "hash" alone
FORMS = {
    "hash": (b"\n## %s: %s\n", b"\n?? %s: "),
    "comment": (b"\n# %s: %s\n", b"\n# %s: "),
    "repeat": (b"\n?? %s: %s\n", b"\n?? %s: "),
    "json": (b'\n"%s": "%s",\n', b'\n"%s": "'),
}
NLL_BYTES = 2048  # bytes from the prompt's middle on that the mean negative log-likelihood is taken over
FIRST_SEED = 4242


@dataclass(frozen=True)
class Prompt:
    """`ids` [1, n] int64 (a token is a byte) and, for each question in order, where its answer lies: (start, length) in bytes."""

    ids: torch.Tensor
    answers: tuple[tuple[int, int], ...]


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


def wilson(right: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927; z = 1.96 gives 95 %). Raises ValueError when nothing was asked."""
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right answers of {asked} asked is no share")
    share, spread = right / asked, z * z / asked
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    # at 0 and 1 the bounds are exact; rounding would leave 1e-17 outside [0, 1]
    low = 0.0 if right == 0 else (centre - half) / (1 + spread)
    high = 1.0 if right == asked else (centre + half) / (1 + spread)
    return low, high


def _word(rng: np.random.Generator, alphabet: np.ndarray, length: int) -> bytes:
    return alphabet[rng.integers(0, len(alphabet), length)].tobytes()


def prompt(length: int, text: bytes, seed: int, needles: int = 32, asks: int = 16, form: str = "hash") -> Prompt:
    """A prompt of exactly `length` bytes out of `text`. Raises ValueError when facts and questions do not fit or `text` is too short."""
    rng = np.random.default_rng(seed)
    fact, question = FORMS[form]
    facts, questions = [], []
    for _ in range(needles):
        key, value = _word(rng, LETTERS, 6), _word(rng, DIGITS, 6)
        facts.append(fact % (key, value))
        questions.append((question % key, value))
    asked = [questions[index] for index in rng.permutation(needles)[:asks]]
    room = length - sum(map(len, facts)) - sum(len(question) + len(value) + 1 for question, value in asked)
    if room < 0 or len(text) <= room:
        raise ValueError(
            f"a prompt of {length} bytes with {needles} needles and {asks} questions needs 0 <= {room} < {len(text)} bytes of text"
        )
    start = int(rng.integers(0, len(text) - room))
    hay = text[start : start + room]
    body, last = bytearray(), 0
    for cut, fact in zip(np.sort(rng.integers(0, max(room, 1), needles)), facts, strict=True):
        body += hay[last:cut] + fact
        last = int(cut)
    body += hay[last:]
    answers = []
    for question, value in asked:
        body += question
        answers.append((len(body), len(value)))
        body += value + b"\n"
    return Prompt(torch.frombuffer(body, dtype=torch.uint8).long()[None], tuple(answers))


def right_answers(logits: torch.Tensor, item: Prompt) -> list[bool]:
    """For each question of `item`, whether every byte of its answer is the argmax of `logits` [1, n, 256]."""
    guesses = logits[0].argmax(-1).cpu()
    ids = item.ids[0].cpu()
    return [bool((guesses[start - 1 : start - 1 + size] == ids[start : start + size]).all()) for start, size in item.answers]


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


def stdlib_text(limit: int | None = None) -> bytes:
    """The source text of this Python's standard library (PSF licence), files in a fixed order, without its tests; at most `limit` bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    # a digest of the name mixes packages, so that any stretch of the text is as varied as the whole
    text = bytearray()
    for path in sorted(files, key=lambda path: (_mix(path.relative_to(root).as_posix()), path)):
        text += path.read_bytes()
        if limit is not None and len(text) >= limit:
            return bytes(text[:limit])
    return bytes(text)


def _mix(name: str) -> int:
    mixed = 2166136261  # FNV-1a, 32 bits
    for byte in name.encode():
        mixed = ((mixed ^ byte) * 16777619) & 0xFFFFFFFF
    return mixed
