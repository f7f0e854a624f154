"""What calibration tries on every head, as data: sinks and windows of several widths, and block selection with several estimates and
thresholds. A head may always stay dense."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sparsify.ops.estimate import Pool
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
# estimates beside each stride with each pool: options of xattention
OTHERS: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Family:
    """Block selection with one estimate. method: without a threshold of its own. thresholds: that are tried with it."""

    method: XAttention
    thresholds: tuple[float, ...]

    @property
    def name(self) -> str:
        finer = f", then {self.method.refine_stride}" if self.method.refine_stride else ""
        return f"stride {self.method.stride} {self.method.pool}{finer}"


@dataclass(frozen=True)
class Setting:
    """What one head does. family: index in the grid's families; None: sinks and a window. value: threshold, or tokens of the window."""

    family: int | None
    value: float


@dataclass(frozen=True)
class Grid:
    """Everything that is tried. windows: last keys, tokens. sinks: first keys, tokens."""

    families: tuple[Family, ...]
    windows: tuple[int, ...] = WINDOWS
    sinks: int = SINKS

    @property
    def settings(self) -> tuple[Setting, ...]:
        """In the order of all measurements."""
        windows = [Setting(None, window) for window in self.windows]
        return (*windows, *(Setting(i, tau) for i, family in enumerate(self.families) for tau in family.thresholds))

    def method(self, setting: Setting) -> XAttention:
        """For a setting of a family."""
        assert setting.family is not None
        return self.families[setting.family].method.model_copy(update={"threshold": setting.value})

    def describe(self) -> dict[str, Any]:
        families = [{**family.method.options(), "threshold": list(family.thresholds)} for family in self.families]
        return {"families": families, "windows": list(self.windows), "sinks": self.sinks}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def grid(options: Mapping[str, Any]) -> Grid:
    """The grid for `options` of torch.compile: what these say of xattention and sink_window is fixed; of thresholds and windows, each in a
    list is tried.

    Raises:
        ConfigError: impossible options.
    """
    given = dict(options.get("xattention", {}))
    config.validate(XAttention, given, "options", "xattention")
    tau, pools = given.pop("threshold", None), (given["pool"],) if "pool" in given else tuple(p for p in get_args(Pool) if p != "sum")
    strides = (given["stride"],) if "stride" in given else STRIDES
    free = ("density", "windows", "sinks", "expected")
    fixed = {key: value for key, value in given.items() if key not in free}
    tried = [{**fixed, "stride": stride, "pool": pool} for pool in pools for stride in strides]
    tried += [{**fixed, **other} for other in OTHERS if not {"stride", "pool"} & given.keys()]
    families = []
    for one in tried:
        method = config.validate(XAttention, one, "options", "xattention")
        thresholds = THRESHOLDS[method.pool] if tau is None else (tau,) if isinstance(tau, float | int) else tuple(tau)
        if method.refine_stride:
            thresholds = tuple(one for one in thresholds if one <= method.coarse_threshold)
        families.append(Family(method, thresholds))
    asked = options.get("sink_window", {})
    window = asked.get("window", WINDOWS)
    return Grid(tuple(families), tuple(window) if isinstance(window, list | tuple) else (window,), asked.get("sinks", SINKS))
