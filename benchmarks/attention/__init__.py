"""How fast are the attention kernels beside others'?"""

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class Kernels(Record):
    """One case. `more` by contestant: `_ms` (median), `_tflops` (over visited blocks), `_rounds` (ms by round), `_difference` (largest, of
    outputs), `_absent` (why it did not run); `density`, `ratio` (the fastest peer's time over ours), `ratio_fa4`; of the section
    "check": `served`, `ok`, `problems`, `error`, `lse_error` (relative); of variants: `_mhz`, `_watts`, `_busy`."""

    NAME = "kernels"
    KEYS = ("section", "case")
    section: str
    case: str
    more: dict[str, Any]
