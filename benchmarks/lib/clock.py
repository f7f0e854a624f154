"""The clock of `sparsify bench`, which is the benchmarks' one."""

from sparsify.commands.bench.clock import (
    Clock,
    Run,
    reason,
)

__all__ = [
    "Clock",
    "Run",
    "reason",
]
