"""What calibration tries on every head, as data: sinks and windows of several widths, block selection with several estimates and
thresholds, columns and diagonals of several numbers. A head may always stay dense."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from sparsify.costs import work
from sparsify.costs.sizes import AttentionSizes
from sparsify.costs.work import Work
from sparsify.errors import ConfigError
from sparsify.ops.estimate import Pool
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.selection import SelectCall
from sparsify.passes.minference import MOST, MInference
from sparsify.passes.xattention import XAttention
from sparsify.planning.config import config

STRIDES = (4, 8, 16)
# by pool: what is tried of each; the rule "sum" loses to "max" at every density and is tried only where it is asked for
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "max": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    "row": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "sum": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
}
WINDOWS = (256, 1024, 4096)
SINKS = 4
# tokens; no columns: the A-shape
COLUMNS = (0, 128, 256, 512, 1024, 2048, 4096)
DIAGONALS = (0, 256, 512, 1024, 2048, 4096)
# tokens, by heads that see neither columns nor diagonals
BLOCKS = (256, 512, 1024, 2048, 4096)
# estimates beside each stride with each pool: options of xattention
OTHERS: tuple[dict[str, Any], ...] = ()

Pattern = tuple[int, int, int]  # columns, diagonals and blocks, tokens
Value = float | Pattern  # a threshold, or tokens of a window; a pattern


@dataclass(frozen=True)
class Way(ABC):
    """One way to make block lists for a layer, in which each head has a value of its own.

    method: with what all heads share.
    """

    method: Any

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def takes(self, family: Family, value: Any) -> bool:
        """Whether a head may have this value of a family."""

    @property
    @abstractmethod
    def takes_windows(self) -> bool:
        """Whether a head beside others may have sinks and a window instead."""

    @property
    def takes_dense(self) -> bool:
        """Whether a head beside others may stay dense."""
        return True

    @abstractmethod
    def works(self, sizes: AttentionSizes, kernel: str, density: float) -> tuple[Work, ...]:
        """What making the lists takes where attention visits this share of the blocks."""

    @abstractmethod
    def options(self, values: Sequence[Any], windows: Sequence[int], sinks: int, expected: tuple[float, float]) -> dict[str, Any]:
        """The method's options, those that are not defaults.

        Args:
            values: of each head; None: it stays dense, or has a window.
            windows: tokens, 0 without one. sinks: tokens.
            expected: the layer's density at 8192 tokens, and the power of the length by which it falls.
        """


@dataclass(frozen=True)
class Family(Way):
    """A way whose values are tried by themselves."""

    @property
    @abstractmethod
    def values(self) -> tuple[Value, ...]:
        """That are tried."""

    def takes(self, family: Family, value: Any) -> bool:
        return family is self

    @property
    @abstractmethod
    def falls(self) -> float:
        """By which power of the length densities are taken to fall where one length alone was measured."""

    @abstractmethod
    def call(self, query: Tensor, key: Tensor, scale: float, value: Any) -> SelectCall | SelectPatternCall:
        """What lists the blocks of causal attention whose heads all have this value."""

    @abstractmethod
    def word(self, value: Any) -> str:
        """What a head with this value does."""

    def series(self, value: Any) -> str:
        """Settings of one name are points of one curve."""
        return self.name

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that is tried."""


@dataclass(frozen=True)
class Estimated(Family):
    """xattention with one estimate. thresholds: that are tried with it."""

    thresholds: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return self.thresholds

    @property
    def name(self) -> str:
        finer = f", then {self.method.refine_stride}" if self.method.refine_stride else ""
        return f"stride {self.method.stride} {self.method.pool}{finer}"

    @property
    def takes_windows(self) -> bool:
        # one estimate, or one list of a first stage, for heads that see different keys
        return "group" not in self.method.estimate and not self.method.refine_stride

    @property
    def falls(self) -> float:
        return 2 / 3  # as published densities do (`sparsify.costs.seconds.expected_density`)

    def call(self, query: Tensor, key: Tensor, scale: float, value: float) -> SelectCall:
        method = self.method.model_copy(update={"threshold": value})
        return SelectCall(query, key, scale=scale, causal=True, **method.selection())

    def word(self, value: float) -> str:
        return "by blocks"

    def works(self, sizes: AttentionSizes, kernel: str, density: float) -> tuple[Work, ...]:
        """Scores, choice and lists of all heads; of two stages the second costs what the first lists, which grows with the density."""
        return self.method.model_copy(update={"density": density}).works(sizes, kernel)[:-1]

    def options(self, values: Sequence[Any], windows: Sequence[int], sinks: int, expected: tuple[float, float]) -> dict[str, Any]:
        options: dict[str, Any] = self.method.model_dump(mode="json", exclude={"threshold", "density", "windows", "sinks", "expected"})
        # as a list even where heads agree: layers of one region may differ in it
        options["threshold"] = [1.0 if value is None else value for value in values]
        if any(windows):
            options |= {"windows": list(windows), "sinks": sinks}
        return {**options, "expected": [round(expected[0], 5), round(expected[1], 4)]}

    def describe(self) -> dict[str, Any]:
        return {**self.method.options(), "threshold": list(self.thresholds)}


@dataclass(frozen=True)
class Patterned(Family):
    """minference. patterns: that are tried."""

    patterns: tuple[Pattern, ...]

    @property
    def values(self) -> tuple[Pattern, ...]:
        return self.patterns

    @property
    def name(self) -> str:
        return f"columns and diagonals of the last {self.method.queries} queries"

    @property
    def takes_windows(self) -> bool:
        return False

    @property
    def takes_dense(self) -> bool:
        return not self.method.mass  # which bounds every head of a layer

    @property
    def falls(self) -> float:
        return 1.0  # a row visits as much however long it is

    def call(self, query: Tensor, key: Tensor, scale: float, value: Pattern) -> SelectPatternCall:
        method = self.method.model_copy(update=dict(zip(self.method.by_head, value, strict=True)))
        return SelectPatternCall(query, key, scale=scale, **method.selection())

    def word(self, value: Pattern) -> str:
        columns, _, blocks = value
        named = "vertical-slash" if columns else "A-shape"
        return named if not blocks else f"{named} or block-sparse" if self.method.divergence else "block-sparse"

    def series(self, value: Pattern) -> str:
        return "blocks" if self.word(value) == "block-sparse" else f"{value[0]} tokens in columns"

    def works(self, sizes: AttentionSizes, kernel: str, density: float) -> tuple[Work, ...]:
        return self.method.works(sizes, kernel)[:-1]

    def options(self, values: Sequence[Any], windows: Sequence[int], sinks: int, expected: tuple[float, float]) -> dict[str, Any]:
        options: dict[str, Any] = self.method.model_dump(mode="json", exclude={*self.method.by_head})
        columns, diagonals, blocks = map(list, zip(*((MOST, 0, 0) if value is None else value for value in values), strict=True))
        if not any(blocks):
            options["divergence"] = None  # there is nothing to choose between
        return {**options, "columns": columns, "diagonals": diagonals, "blocks": blocks}

    def describe(self) -> dict[str, Any]:
        return {**self.method.options(), "patterns": [list(pattern) for pattern in self.patterns]}


@dataclass(frozen=True)
class Joined(Way):
    """xattention with one estimate, whose heads may have columns and diagonals instead.

    method: as `estimated` has it.
    """

    estimated: Estimated
    patterned: Patterned

    @classmethod
    def of(cls, estimated: Estimated, patterned: Patterned) -> Joined | None:
        """None where one method cannot hold both: of two stages the first lists for groups of heads, what prompts decide of patterns
        minference alone knows, and the last rows of a layer see every key for all of its heads or for none."""
        apart = estimated.method.refine_stride or patterned.method.mass or patterned.method.divergence
        apart = apart or estimated.method.last_rows != patterned.method.last_rows
        return None if apart else cls(estimated.method, estimated, patterned)

    @property
    def name(self) -> str:
        return f"{self.estimated.name}, {self.patterned.name}"

    def takes(self, family: Family, value: Any) -> bool:
        return family is self.estimated or (family is self.patterned and not value[2])

    @property
    def takes_windows(self) -> bool:
        return self.estimated.takes_windows

    def works(self, sizes: AttentionSizes, kernel: str, density: float) -> tuple[Work, ...]:
        return *self.estimated.works(sizes, kernel, density), work.pattern_choice(sizes, self.patterned.method.queries)

    def options(self, values: Sequence[Any], windows: Sequence[int], sinks: int, expected: tuple[float, float]) -> dict[str, Any]:
        patterns = [list(value[:2]) if isinstance(value, tuple) else [] for value in values]
        thresholds = [None if pattern else value for pattern, value in zip(patterns, values, strict=True)]
        options = self.estimated.options(thresholds, windows, sinks, expected)
        return {**options, "patterns": patterns, "queries": self.patterned.method.queries} if any(patterns) else options


@dataclass(frozen=True)
class Setting:
    """What one head does. family: index in the grid's families; None: sinks and a window. value: of the family, or tokens of the window."""

    family: int | None
    value: Any


@dataclass(frozen=True)
class Grid:
    """Everything that is tried. windows: last keys, tokens. sinks: first keys, tokens. joined: ways to join what families try."""

    families: tuple[Family, ...]
    windows: tuple[int, ...] = WINDOWS
    sinks: int = SINKS
    joined: tuple[Joined, ...] = ()

    @property
    def ways(self) -> tuple[Way, ...]:
        """The families, and then what joins them."""
        return (*self.families, *self.joined)

    def takes(self, way: int, setting: Setting) -> bool:
        """Whether a head in a layer of one of the ways may have a setting's block lists."""
        return setting.family is not None and self.ways[way].takes(self.families[setting.family], setting.value)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """In the order of all measurements."""
        windows = [Setting(None, window) for window in self.windows]
        return (*windows, *(Setting(i, value) for i, family in enumerate(self.families) for value in family.values))

    @property
    def block(self) -> int:
        """Tokens of a block, of all families."""
        return self.families[0].method.block if self.families else 128

    def describe(self) -> dict[str, Any]:
        return {"families": [family.describe() for family in self.families], "windows": list(self.windows), "sinks": self.sinks}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def grid(options: Mapping[str, Any]) -> Grid:
    """The grid for `options` of torch.compile: what these say of xattention and sink_window is fixed; of thresholds and windows, each in a
    list is tried.

    Raises:
        ConfigError: impossible options.
    """
    return Grid(_estimated(options), *_windows(options))


def pattern_grid(options: Mapping[str, Any], beside: Iterable[str] = ()) -> Grid:
    """The grid of minference: what `options` say of it is fixed, and of columns and diagonals each in a list is tried with each; of blocks
    each by itself, or with all of these where a divergence chooses between them.

    Args:
        beside: "xattention", "sink_window": that a layer may have instead, each tried as in `grid`; and heads beside xattention's may have
            columns and diagonals.

    Raises:
        ConfigError: impossible options, or blocks of different sizes.
    """
    given = dict(options.get("minference", {}))
    config.validate(MInference, {"blocks": BLOCKS, **given}, "options", "minference")
    tried = (("columns", COLUMNS), ("diagonals", DIAGONALS), ("blocks", BLOCKS))
    columns, diagonals, blocks = (_each(given.pop(name, every)) for name, every in tried)
    shown = {**given, "blocks": MOST} if "divergence" in given else given
    method = config.validate(MInference, shown, "options", "minference")
    if method.divergence:
        patterns = tuple(itertools.product(columns, diagonals, blocks))
    else:
        patterns = (*itertools.product(columns, diagonals, (0,)), *((0, 0, one) for one in blocks if one))
    patterned = Patterned(method, patterns)
    estimated = _estimated(options) if "xattention" in beside else ()
    families: tuple[Family, ...] = (patterned, *estimated)
    joined = tuple(one for each in estimated if (one := Joined.of(each, patterned)) is not None)
    found = Grid(families, *(_windows(options) if "sink_window" in beside else ((), SINKS)), joined)
    if len({family.method.block for family in families}) > 1:
        raise ConfigError("blocks of xattention and of minference differ in size", where="options")
    return found


def _estimated(options: Mapping[str, Any]) -> tuple[Estimated, ...]:
    given = dict(options.get("xattention", {}))
    config.validate(XAttention, given, "options", "xattention")
    finer = given.get("refine_stride") or 0
    pools = ("row",) if finer or given.get("min_share") else tuple(pool for pool in get_args(Pool) if pool != "sum")
    tau, pools = given.pop("threshold", None), (given["pool"],) if "pool" in given else pools
    strides = (given["stride"],) if "stride" in given else tuple(stride for stride in STRIDES if stride > finer)
    free = ("density", "windows", "sinks", "expected")
    # thresholds are tried by themselves, unless a least share beside them was asked for
    fixed = {"min_share": 0.0} | {key: value for key, value in given.items() if key not in free}
    tried = [{**fixed, "stride": stride, "pool": pool} for pool in pools for stride in strides]
    tried += [{**fixed, **other} for other in OTHERS if not {"stride", "pool"} & given.keys()]
    families = []
    for one in tried:
        method = config.validate(XAttention, one, "options", "xattention")
        thresholds = THRESHOLDS[method.pool] if tau is None else _each(tau)
        if method.refine_stride:
            thresholds = tuple(one for one in thresholds if one <= method.coarse_threshold)
        families.append(Estimated(method, thresholds))
    return tuple(families)


def _windows(options: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    asked = options.get("sink_window", {})
    return _each(asked.get("window", WINDOWS)), asked.get("sinks", SINKS)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
