"""Tasks for models of word pieces: text with facts in it and questions about them, as tokens, for training and for scoring.

A sequence is text (or another filler) with lines at random places and, for most tasks, questions at its end:

    facts      key and value in many wordings, asked for in other words than they were told; questions anywhere after, or at the end
    magic      the needles of RULER (arXiv 2404.06654): among text, repeated sentences, or other needles; numbers, words or UUIDs
    chains     variables that are assigned to each other, in RULER's wording or as code
    common     RULER's most common words of a numbered list
    frequent   RULER's most frequent coded words
    text       nothing but text

Each token has a code: NOISE (nobody can foresee it), TEXT or ANSWER. The draws depend on the seed, the tokenizer and the text alone.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

NOISE, TEXT, ANSWER = 0, 1, 2
NOISE_SENTENCE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NOUNS = ("value", "code", "number", "password", "token", "identifier", "label", "secret", "result")
BREAK = "\n"
MAGIC_ASK = "What is the special magic {n} for {k} mentioned in the provided text?"
MAGIC_ANSWER = "The special magic {n} for {k} mentioned in the provided text is"
WEIGHTS = {"text": 0.12, "facts": 0.5, "magic": 0.17, "chains": 0.13, "common": 0.04, "frequent": 0.04}


@dataclass(frozen=True)
class Form:
    """A wording of a fact, and of the questions about it. keys: kinds of key that it suits."""

    fact: str
    asks: tuple[str, ...]
    keys: tuple[str, ...] = ("letters", "identifier", "pair", "camel")


_NAMES = ("letters", "identifier", "camel")
FORMS = {
    "hash": Form("\n## {k}: {v}\n", ("\n?? {k}: {v}\n",)),
    "value": Form(
        "\nThe value of {k} is {v}.\n", ("\nWhat is the value of {k}? The value of {k} is {v}.\n", "\nQ: the value of {k}? A: {v}\n")
    ),
    "assign": Form("\n{k} = {v}\n", ("\n>>> {k}\n{v}\n", "\nassert {k} == {v}\n", "\nprint({k})  # {v}\n"), _NAMES),
    "dict": Form('\n    "{k}": "{v}",\n', ('\n>>> config["{k}"]\n"{v}"\n', '\nassert lookup("{k}") == "{v}"\n')),
    "comment": Form("\n# note: {k} was changed to {v}\n", ("\n# what was {k} changed to? {v}\n", "\n# {k} is now {v}\n")),
    "default": Form("\n:param {k}: defaults to {v}\n", ("\nThe default of {k} is {v}\n", "\n{k} (default: {v})\n"), _NAMES),
    "arrow": Form("\n{k} -> {v}\n", ("\nWhat does {k} map to? {v}\n", "\n{k} maps to {v}\n")),
    "shell": Form("\nexport {k}={v}\n", ("\n$ echo ${k}\n{v}\n", "\nenv[{k}]: {v}\n"), _NAMES),
    "row": Form("\n| {k} | {v} |\n", ("\nIn the table, {k} stands beside {v}\n", "\ntable[{k}]: {v}\n")),
    "remember": Form(
        "\nRemember that the {n} for {k} is {v}, you will need it later.\n",
        ("\nQuestion: which {n} was given for {k}?\nAnswer: {v}\n", "\nThe {n} for {k}, as told before, is {v}\n"),
    ),
    "magic": Form("\nOne of the special magic {n}s for {k} is: {v}.\n", (f"\n{MAGIC_ASK} {MAGIC_ANSWER} {{v}}\n",)),
}  # fmt: skip
# never trained on: what they answer shows whether the model learnt to look up, or wordings
HELD_OUT_FORMS = {
    "room": Form("\nDear reader, {k} has moved to room {v} since.\n", ("\nIn which room can {k} be found now? In room {v}\n",)),
    "tag": Form('\n<entry name="{k}">{v}</entry>\n', ("\nentry named {k} contains {v}\n",)),
}


@dataclass(frozen=True)
class Line:
    """A text and the codes of some of its spans, (start, end, code) in characters; what no span covers is `rest`."""

    text: str
    spans: tuple[tuple[int, int, int], ...] = ()
    rest: int = TEXT


@dataclass(frozen=True)
class Unit:
    """Lines that belong together: `body` at random places but in this order, `tail` at the end of the sequence."""

    body: list[Line]
    tail: list[Line] = field(default_factory=list)


def render(template: str, rest: int = TEXT, **fields: tuple[str, int]) -> Line:
    """`template` with {name} replaced by the field's text; its characters get the field's code."""
    text, spans = "", []
    for number, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if number % 2:
            value, code = fields[part]
            spans.append((len(text), len(text) + len(value), code))
            text += value
        else:
            text += part
    return Line(text, tuple(spans), rest)


Tokens = tuple[np.ndarray, np.ndarray]  # ids uint16, codes uint8


@dataclass
class Maker:
    """Makes sequences out of `text` (tokens, uint16) and `words`."""

    tokenizer: Tokenizer
    text: np.ndarray
    words: Sequence[str]

    def __post_init__(self) -> None:
        self.noise = np.array(self.tokenizer.encode(NOISE_SENTENCE).ids, np.uint16)

    def encode(self, lines: list[Line]) -> list[Tokens]:
        found = []
        for line, encoding in zip(lines, self.tokenizer.encode_batch([line.text for line in lines]), strict=True):
            codes = np.full(len(encoding.ids), line.rest, np.uint8)
            if line.spans:
                starts, ends = np.array(encoding.offsets).T
                for start, end, code in line.spans:
                    codes[(starts < end) & (ends > start)] = code
            found.append((np.array(encoding.ids, np.uint16), codes))
        return found

    # what keys and values look like

    def key(self, rng: random.Random, kind: str) -> str:
        first, second = rng.choice(self.words), rng.choice(self.words)
        match kind:
            case "identifier":
                return f"{first}_{second}"
            case "pair":
                return f"{first}-{second}"
            case "camel":
                return first.capitalize() + second.capitalize()
            case "uuid":
                return str(uuid.UUID(int=rng.getrandbits(128), version=4))
            case "digits":
                return str(rng.randrange(10**6, 10**7)) if rng.random() < 0.5 else str(rng.randrange(10 ** rng.randint(3, 7)))
            case "hex":
                return f"{rng.getrandbits(32):08x}"
            case _:
                return "".join(rng.choices(string.ascii_lowercase, k=6))

    # tasks: units to place, and what stands before them

    def facts(self, rng: random.Random, length: int, forms: dict[str, Form], place: Literal["any", "end"] | None = None) -> list[Unit]:
        place = place or rng.choice(("any", "end"))
        chosen = rng.sample(list(forms.values()), min(len(forms), rng.choice((1, 1, 2, 3))))
        values = rng.choice(("digits", "digits", "digits", "letters", "pair", "hex", "uuid" if length >= 1024 else "digits"))
        units = []
        for _ in range(rng.randint(max(2, min(length // 256, 24)), max(4, min(length // 64, 64)))):
            form = rng.choice(chosen)
            key, value = self.key(rng, rng.choice(form.keys)), self.key(rng, values)
            noun = rng.choice(NOUNS)
            fact = render(form.fact, k=(key, NOISE), v=(value, NOISE), n=(noun, NOISE))
            asks = [
                render(rng.choice(form.asks), k=(key, NOISE), v=(value, ANSWER), n=(noun, NOISE))
                for _ in range(rng.randint(1, 2) if place == "any" else rng.randint(0, 1))
            ]
            units.append(Unit([fact, *asks]) if place == "any" else Unit([fact], asks))
        if place == "end" and not any(unit.tail for unit in units):
            return self.facts(rng, length, forms, place)
        return units

    def magic(self, rng: random.Random, length: int, values: str | None = None, filler: str | None = None) -> tuple[Line, list[Unit], str]:
        values = values or rng.choice(("digits", "digits", "uuid", "pair"))
        keys = "uuid" if values == "uuid" and rng.random() < 0.5 else "pair"
        filler = filler or rng.choice(("text", "sentences", "needles", "needles"))
        noun = {"digits": "number", "uuid": "uuid", "pair": "word"}[values]
        asked = rng.randint(1, 6)
        count = max(4, length // (64 if values == "uuid" else 24)) if filler == "needles" else rng.randint(asked, 8)
        break_ = rng.choice(("\n", " ", "\n"))
        units = []
        for number in range(count):
            key, value = self.key(rng, keys), self.key(rng, values)
            fact = render(
                "One of the special magic {n}s for {k} is: {v}." + break_, NOISE, k=(key, NOISE), v=(value, NOISE), n=(noun, NOISE)
            )
            ask = render(
                f"\n{MAGIC_ASK}{rng.choice((' ', BREAK))}{MAGIC_ANSWER}{rng.choice(('', '', ':'))} {{v}}.",
                k=(key, NOISE),
                v=(value, ANSWER),
                n=(noun, NOISE),
            )
            units.append(Unit([fact], [ask] if number < asked else []))
        head = f"A special magic {noun} is hidden within the following text. Make sure to memorize it. "
        head += f"I will quiz you about the {noun} afterwards.\n"
        if rng.random() < 0.3:
            head = head.replace("A special magic", "Some special magic").replace(noun, noun + "s").replace(" is hidden", " are hidden")
        return Line(head, rest=NOISE), units, filler

    def chains(self, rng: random.Random, length: int, code: bool | None = None) -> tuple[Line | None, list[Unit], str]:
        code = rng.random() < 0.5 if code is None else code
        units = []
        for _ in range(rng.randint(1, 2 if not code else max(2, min(16, length // 200)))):
            hops = rng.randint(1, 4)
            value = str(rng.randrange(10000, 100000)) if not code else self.key(rng, "digits")
            if code:
                names = [self.key(rng, rng.choice(_NAMES)) for _ in range(hops + 1)]
                first, further = "\n{a} = {v}\n", "\n{a} = {b}\n"
                wording = rng.choice(("\nassert {a} == {v}\n", "\n>>> {a}\n{v}\n", "\nprint({a})  # {v}\n"))
                asks = [render(wording, a=(name, NOISE), v=(value, ANSWER)) for name in rng.sample(names, rng.randint(1, min(3, hops + 1)))]
            else:
                size = rng.choice((3, 5, 5, 5))
                names = ["".join(rng.choices(string.ascii_uppercase, k=size)) for _ in range(hops + 1)]
                first, further = " VAR {a} = {v}", " VAR {a} = VAR {b} "
                asks = [
                    render(
                        "\nQuestion: Find all variables that are assigned the value {q} in the text above.{s}Answer: According to the "
                        "chain(s) of variable assignment in the text above, {n} variables are assgined the value {q}, they are: {v}\n",
                        s=(rng.choice((" ", "\n")), TEXT),
                        q=(value, NOISE),
                        n=(str(hops + 1), NOISE),
                        v=(" ".join(names), ANSWER),
                    )
                ]
            body = [render(first, a=(names[0], NOISE), v=(value, NOISE))]
            body += [render(further, a=(new, NOISE), b=(old, NOISE)) for old, new in pairwise(names)]
            units.append(Unit(body, asks))
        if code:
            return None, units, "text"
        head = Line("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n", rest=NOISE)
        return head, units, rng.choice(("text", "sentences", "sentences"))

    def common(self, rng: random.Random, items: int) -> tuple[Line, Line]:
        often, seldom = (30, 3) if items >= 450 else (10, 3) if items >= 180 else (6, 1) if items >= 80 else (3, 1)
        rest = max(2, (items - 10 * often) // seldom)
        chosen = rng.sample(list(self.words), min(10 + rest, len(self.words)))
        listed = chosen[:10] * often + chosen[10:] * seldom
        rng.shuffle(listed)
        head = "Below is a numbered list of words. In these words, some appear more often than others. "
        head += "Memorize the ones that appear most often.\n"
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(chosen[:10], 1))
        ask = (
            "\nQuestion: What are the 10 most common words in the above list?{s}Answer: The top 10 words that appear most often in the "
            "list are:{s}{v}\n"
        )
        return (
            Line(head + " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)), rest=NOISE),
            render(ask, s=(rng.choice((" ", " ", "\n")), TEXT), v=(answer, ANSWER)),
        )

    def frequent(self, rng: random.Random, items: int) -> tuple[Line, Line]:
        coded = ["...", *("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(12, items // 12)))]
        listed = [word for rank, word in enumerate(coded, 1) for _ in range(int(items * rank**-2.0 / 1.645))]
        rng.shuffle(listed)
        head = "Read the following coded text and track the frequency of each coded word. "
        head += "Find the three most frequently appeared coded words. "
        ask = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words "
            "in the above coded text?{s}Answer: According to the coded text above, the three most frequently appeared words are: {v}\n"
        )
        return Line(head + " ".join(listed), rest=NOISE), render(ask, s=(rng.choice((" ", "\n")), TEXT), v=(" ".join(coded[1:4]), ANSWER))

    # sequences

    def filler(self, rng: random.Random, kind: str, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """ids [length], codes [length], and the distance of places where a line may stand."""
        if kind == "sentences":
            return np.resize(self.noise, length), np.full(length, NOISE, np.uint8), len(self.noise)
        start = rng.randrange(len(self.text) - length)
        return self.text[start : start + length], np.full(length, TEXT, np.uint8), 1

    def assemble(self, rng: random.Random, length: int, head: list[Line], units: list[Unit], filler: str) -> Tokens:
        """As many of the units, from the first on, as fit into 0.8 of `length` tokens (0.97 where they are the filler), and filler."""
        room = (0.97 if filler == "needles" else 0.8) * length
        flat = [line for unit in units for line in (*unit.body, *unit.tail)]
        encoded = iter(self.encode(head + flat))
        heads = [next(encoded) for _ in head]
        bodies: list[list[Tokens]] = []
        tails: list[Tokens] = []
        used = sum(len(ids) for ids, _ in heads)
        for unit in units:
            body, tail = [next(encoded) for _ in unit.body], [next(encoded) for _ in unit.tail]
            size = sum(len(ids) for ids, _ in (*body, *tail))
            if used + size <= room:
                used += size
                bodies.append(body)
                tails += tail
        rng.shuffle(tails)
        ids, codes, step = self.filler(rng, filler, length - used)
        # places of all lines; which unit a place belongs to is random, and within a unit they come in order
        owners = [number for number, body in enumerate(bodies) for _ in body]
        rng.shuffle(owners)
        cuts = sorted(rng.randint(0, len(ids) // step) * step for _ in owners)
        pieces, last, upcoming = [*heads], 0, [iter(body) for body in bodies]
        for cut, owner in zip(cuts, owners, strict=True):
            pieces += [(ids[last:cut], codes[last:cut]), next(upcoming[owner])]
            last = cut
        pieces += [(ids[last:], codes[last:]), *tails]
        return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])

    def listing(self, rng: random.Random, length: int, task: Callable[[random.Random, int], tuple[Line, Line]]) -> Tokens:
        """A list that fills the sequence, its question, and text before it for what is left."""
        items = length // 4
        while True:
            pieces = self.encode(list(task(rng, items)))
            used = sum(len(ids) for ids, _ in pieces)
            if used <= length:
                break
            if items < 8:
                raise ValueError(f"{length} tokens are too few for {task.__name__}")
            items = int(items * min(0.95, length / used))
        ids, codes, _ = self.filler(rng, "text", length - used)
        pieces = [(ids, codes), *pieces]
        return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])

    def make(self, rng: random.Random, task: str, length: int, forms: dict[str, Form] = FORMS) -> Tokens:
        """One sequence of `length` tokens: ids uint16, codes uint8. `common` and `frequent` need 500 tokens, the others 200."""
        match task:
            case "facts":
                return self.assemble(rng, length, [], self.facts(rng, length, forms), "text")
            case "magic":
                head, units, filler = self.magic(rng, length)
                return self.assemble(rng, length, [head], units, filler)
            case "chains":
                first, units, filler = self.chains(rng, length)
                return self.assemble(rng, length, [first] if first else [], units, filler)
            case "common":
                return self.listing(rng, length, self.common)
            case "frequent":
                return self.listing(rng, length, self.frequent)
            case _:
                return self.filler(rng, "text", length)[:2]

    def batch(self, seed: int, count: int, length: int) -> Tokens:
        """ids and codes [count, length], tasks drawn by WEIGHTS."""
        rng = random.Random(seed)
        names = [name for name in WEIGHTS if length >= 1000 or name not in ("common", "frequent")]
        rows = [self.make(rng, rng.choices(names, [WEIGHTS[name] for name in names])[0], length) for _ in range(count)]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])


def answers(codes: np.ndarray) -> list[tuple[int, int]]:
    """Where the answers of one sequence lie: (start, length) in tokens; codes [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (codes == ANSWER).astype(np.int8), [0]])))
    return [(int(start), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def asked(maker: Maker, length: int) -> dict[str, Callable[[random.Random], Tokens]]:
    """What a model is asked, by name: wordings one by one, those never trained on, RULER's needles, chains; each makes a sequence."""

    def facts(form: str, rng: random.Random) -> Tokens:
        return maker.assemble(rng, length, [], maker.facts(rng, length, {form: forms[form]}, "end"), "text")

    def magic(values: str, filler: str, rng: random.Random) -> Tokens:
        first, units, kind = maker.magic(rng, length, values, filler)
        return maker.assemble(rng, length, [first], units, kind)

    def chains(code: bool, rng: random.Random) -> Tokens:
        first, units, kind = maker.chains(rng, length, code)
        return maker.assemble(rng, length, [first] if first else [], units, kind)

    forms = {name: FORMS[name] for name in ("hash", "assign", "value", "remember")} | HELD_OUT_FORMS
    found: dict[str, Callable[[random.Random], Tokens]] = {f"facts, {name}": partial(facts, name) for name in forms}
    pairs = (("digits", "text"), ("digits", "sentences"), ("digits", "needles"), ("uuid", "needles"))
    found |= {f"magic, {values} in {filler}": partial(magic, values, filler) for values, filler in pairs}
    return found | {"chains, code": partial(chains, True), "chains, ruler": partial(chains, False)}
