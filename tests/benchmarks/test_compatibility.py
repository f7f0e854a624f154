"""The compatibility page is what the recorded runs say."""

from __future__ import annotations

from benchmarks.test_runs import compatibility


def run(suite, torch, triton, transformers, day, **counts):
    machine = {"torch": torch, "triton": triton, "transformers": transformers}
    return {
        "benchmark": "compatibility",
        "suite": suite,
        "time": f"{day}T00:00:00",
        "machine": machine,
        "counts": {"passed": 0, "failed": 0, "error": 0, **counts},
    }


def test_a_cell_is_the_latest_run_of_its_versions():
    text = compatibility.page([
        run("quick", "2.13.0+cpu", "3.7.1", "5.24.0", "2026-01-01", failed=3, error=1, passed=6),
        run("quick", "2.13.0", "3.7.1", "5.24.0", "2026-01-02", passed=10),
        run("quick", "2.11.0", "3.6.0", "5.9.0", "2026-01-03", failed=1, passed=9),
    ])  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| torch, triton | transformers 5.9.0 | transformers 5.24.0 |",
        "| 2.11.0, 3.6.0 | 1 of 10 failed, 2026-01-03 | not run |",
        "| 2.13.0, 3.7.1 | not run | 10 passed, 2026-01-02 |",
    ]
