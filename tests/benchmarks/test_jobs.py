"""Cells of a benchmark are served once each, by as many processes as are asked for, and failures are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lib import jobs


def serve(queue, folder: Path, wrong: int) -> int:
    failed = 0
    while (cell := queue.get()) is not None:
        if cell == wrong:
            failed += 1
        else:
            (folder / f"{cell}").touch(exist_ok=False)
    return failed


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_every_cell_once(tmp_path, processes, wrong):
    assert jobs.run(serve, range(6), processes, tmp_path, wrong) == int(wrong >= 0)
    assert {int(file.name) for file in tmp_path.iterdir()} == {*range(6)} - {wrong}
