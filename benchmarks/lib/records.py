"""Records of the benchmarks, and where they are kept; tables and plots are made from these files alone (`python -m benchmarks report`)."""

from __future__ import annotations

from pathlib import Path

from sparsify.commands.bench.records import Record, append, read
from sparsify.commands.provenance import COMMIT_VARIABLE, code_version, machine, sha256

__all__ = ["COMMIT_VARIABLE", "RESULTS", "Record", "append", "code_version", "machine", "read", "sha256"]

RESULTS = Path(__file__).parents[1] / "results"
