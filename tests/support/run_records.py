"""Records test runs for docs/compatibility.md: `pytest --record-run SUITE` appends versions, date, commit and counts to a results file."""

from __future__ import annotations

import pytest

from benchmarks.lib import records
from benchmarks.test_runs import Compatibility

FILE = records.RESULTS / "compatibility.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-run", metavar="SUITE", help="append this run's versions and counts to benchmarks/results/compatibility.jsonl"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.getoption("--record-run")
    if not suite or hasattr(config, "workerinput"):
        return
    counts = {what: len(terminalreporter.stats.get(what, [])) for what in ("passed", "failed", "error", "skipped")}
    failed = [report.nodeid for what in ("failed", "error") for report in terminalreporter.stats.get(what, [])]
    records.append(FILE, Compatibility(suite=suite, counts=counts, failed=failed))
