"""How the block estimate is made cheaper: one table of its variants, and the value that says which of them are in use.

Whoever needs the variants reads them here: the method's option, the op, its kernels, costs, tests, benchmarks and docs/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from sparsify.errors import UnsupportedError

VariantName = Literal["half", "group", "pair", "quad", "int8", "peak"]
Pool = Literal["sum", "max", "row"]
EXACT_NAME = "exact"


@dataclass(frozen=True)
class Variant:
    """One way to make the estimate cheaper.

    sets: the fields of `Estimate` that it changes.
    computes: what is computed, for people, as docs/kernels.md lists it.
    cost: its share of the exact estimate's work, likewise.
    share: its products over the exact estimate's, 8-bit ones counted half; of the number of query heads per KV head.
    entry: what a score costs beside its products, over the exact estimate's, where it is exponentiated and added up.
    examples: estimates that it is tested in.
    """

    sets: Mapping[str, Any]
    computes: str
    cost: str
    share: Callable[[int], Fraction]
    examples: tuple[str, ...]
    entry: Fraction = Fraction(1)


VARIANTS: dict[VariantName, Variant] = {
    "half": Variant(
        {"half": True}, "every second query cell; keys stay complete", "1/2", lambda group: Fraction(1, 2), ("half", "half+int8")
    ),
    "group": Variant(
        {"group": True},
        "one estimate for each KV head, from the mean of its query heads",
        "1 / query heads per KV head",
        lambda group: Fraction(1, group),
        ("group", "group+int8", "half+group+int8"),
    ),
    "pair": Variant(
        {"merge": 2},
        "the mean of two neighbouring tokens stands for both, among queries and keys",
        "1/2, and one more pass over queries and keys",
        lambda group: Fraction(1, 2),
        ("pair", "pair+int8", "half+pair+int8"),
    ),
    "quad": Variant({"merge": 4}, "the mean of four", "1/4, and the same pass", lambda group: Fraction(1, 4), ("quad", "quad+int8")),
    "int8": Variant(
        {"int8": True},
        "8-bit products at twice the rate; each cell is rounded with a scale of its own",
        "1/2, and the same pass; the keys are read twice",
        lambda group: Fraction(1, 2),
        ("int8",),
    ),
    "peak": Variant(
        {"peak": True},
        "a key block counts by its highest score, not by the sum over its cells; with 8 bits all cells of a key block share a scale",
        "1, but one exponential for a block of keys instead of one for each cell",
        lambda group: Fraction(1),
        ("peak", "int8+peak", "pair+int8+peak", "half+quad+peak"),
        entry=Fraction(1, 4),
    ),
}


@dataclass(frozen=True)
class Estimate:
    """What the estimate multiplies. Without any variant it is the published one, exact.

    half: only every second query cell is scored.
    group: one estimate per KV head, from the mean of its query heads.
    merge: so many neighbouring tokens' mean stands for them all, of queries and of keys; 1: none are merged.
    int8: cells are rounded to 8 bits, each with a scale of its own, keys after their mean is taken away.
    peak: the mass of a key block is that of its highest score; int8 gives the cells of a key block one scale, so that integers compare.
    """

    half: bool = False
    group: bool = False
    merge: int = 1
    int8: bool = False
    peak: bool = False

    @classmethod
    def from_names(cls, names: Iterable[str]) -> Estimate:
        """The estimate with these variants.

        Raises:
            UnsupportedError: an unknown variant, one that is named twice, or two that exclude each other.
        """
        found: dict[str, Any] = {}
        for name in names:
            if name not in VARIANTS:
                raise UnsupportedError(f"unknown variant {name!r} of the estimate", hint=f"any of {', '.join(VARIANTS)}")
            for field, value in VARIANTS[name].sets.items():
                if field in found:
                    other = next(one for one in VARIANTS if VARIANTS[one].sets.get(field) == found[field])
                    raise UnsupportedError(f"names a variant twice: {name}" if other == name else f"{other} and {name} exclude each other")
                found[field] = value
        return cls(**found)

    @classmethod
    def parse(cls, text: str) -> Estimate:
        """The estimate that `str` gives this text for: "exact", or variants joined by "+"."""
        return cls() if text == EXACT_NAME else cls.from_names(text.split("+"))

    @property
    def variants(self) -> tuple[VariantName, ...]:
        """Names of the variants in use, in the table's order."""
        return tuple(name for name, one in VARIANTS.items() if all(getattr(self, field) == value for field, value in one.sets.items()))

    def __str__(self) -> str:
        return "+".join(self.variants) or EXACT_NAME

    @property
    def prepared(self) -> bool:
        """Whether cells of their own are made before they are multiplied, side by side."""
        return self.merge > 1 or self.int8

    def span(self, stride: int) -> int:
        """Query rows from one scored query cell to the next."""
        return stride * (2 if self.half else 1)

    def scored_heads(self, heads: Any, kv_heads: Any) -> Any:
        """Heads that have an estimate of their own."""
        return kv_heads if self.group else heads

    def share(self, group: int) -> Fraction:
        """Its products over the exact estimate's, 8-bit ones counted half, with `group` query heads per KV head."""
        share = Fraction(1)
        for name in self.variants:
            share *= VARIANTS[name].share(group)
        return share

    @property
    def entry(self) -> Fraction:
        """What a score costs beside its products, over the exact estimate's."""
        return math.prod((VARIANTS[name].entry for name in self.variants), start=Fraction(1))


EXACT = Estimate()
DEFAULT = Estimate(merge=2, int8=True, peak=True)
EXAMPLES = (EXACT, *(Estimate.parse(text) for one in VARIANTS.values() for text in one.examples))


def label(pool: str, estimate: Estimate, refine_stride: int = 0, coarse_threshold: float = 0.0, min_share: float = 0.0) -> str:
    """How records and notes name both at once: "max", "max+pair+int8"; with a second stage "row+int8/4@0.9", with a least share
    "row:0.03+int8"."""
    stages = f"/{refine_stride}@{coarse_threshold:g}" if refine_stride else ""
    return "+".join((pool + (f":{min_share:g}" if min_share else ""), *estimate.variants)) + stages


def parse_label(text: str) -> dict[str, Any]:
    """The arguments `pool` and `estimate` of the op for a label, and those of a least share and a second stage where it has them."""
    first, _, second = text.partition("/")
    rule, *names = first.split("+")
    pool, _, share = rule.partition(":")
    stride, _, threshold = second.partition("@")
    stages = {"refine_stride": int(stride), "coarse_threshold": float(threshold)} if second else {}
    return {"pool": pool, "estimate": Estimate.from_names(names), **stages, **({"min_share": float(share)} if share else {})}


def as_markdown() -> str:
    """The table of variants as docs/kernels.md has it."""
    rows = [f"| `{name}` | {one.computes} | {one.cost} |" for name, one in VARIANTS.items()]
    return "\n".join(["| variant | what it computes | share of the exact estimate's work |", "|---|---|---|", *rows])
