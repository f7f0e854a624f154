"""Tables and plots of what was measured on CPUs say what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cpu import CpuDecode, CpuTokensOn, decode, report
from benchmarks.lib import records
from benchmarks.model.report import long_prompt_plot


def found(path: Path, *given: records.Record) -> list[dict]:
    for record in given:
        records.append(path, record)
    return list(records.read([path]))


def token(way: str, variant: str, ms: float, first: float | None = None) -> CpuDecode:
    return CpuDecode(layers=4, hidden=128, prompt=64, threads=1, way=way, variant=variant, cpu_ms=ms, ratio=ms / 2.0, first_s=first)


def test_tokens_stand_beside_the_faster_of_inductors_caches(tmp_path: Path) -> None:
    lines = report.decode_table(
        found(
            tmp_path / "cpu.jsonl",
            token("forward", decode.SPARSIFY, 9.0, 1.0),
            token("forward", decode.SPARSIFY, 2.5, 12.25),  # the latest counts
            token("generate", decode.SPARSIFY, 3.0),
        )
    ).splitlines()
    assert lines[-2] == "| 4 × 128 | 64 | forward calls | sparsify.compile | 2.50 | 1.25 | 12.2 |"
    assert lines[-1] == "| 4 × 128 | 64 | `generate()` | sparsify.compile | 3.00 | 1.50 | – |"


def test_tokens_that_go_on_are_sorted_and_drawn(tmp_path: Path) -> None:
    cell = lambda layer, keep, ratio: CpuTokensOn(
        length=4096, layers=8, hidden=256, threads=1, layer=layer, keep=keep, cpu_s=ratio, dense_cpu_s=1.0, ratio=ratio, cache_share=keep
    )
    lines = found(tmp_path / "cpu.jsonl", cell(3, 0.5, 0.75), cell(1, 0.5, 0.6), cell(1, 0.1, 0.3))
    table = report.tokens_on_table(lines).splitlines()
    assert [row.split(" | ")[2:4] for row in table[-3:]] == [["1", "10%"], ["1", "50%"], ["3", "50%"]]
    assert "| 0.30 |" in table[-3]
    pytest.importorskip("matplotlib")
    axis = report.tokens_on_plot(lines).axes[0]
    drawn = {line.get_label(): list(map(float, line.get_ydata())) for line in axis.lines}
    assert drawn["chosen by layer 1"] == [0.3, 0.6] and drawn["2 of 8 layers"] == [0.25, 0.25]
    assert report.tokens_on_plot([]) is None


def test_memory_of_long_prompts_is_drawn_from_their_records() -> None:
    pytest.importorskip("matplotlib")
    lines = [json.loads(line) for line in (records.RESULTS / "long_prompt.jsonl").read_text().splitlines()]
    widths = [[bar.get_width() for bar in bars] for bars in long_prompt_plot(lines).axes[0].containers]
    weights, rest, spared = widths
    assert len(weights) == 2 and all(one + more > one > 10 for one, more in zip(weights, rest, strict=True))
    assert spared == [0.0, 56.0]  # a million tokens: gate and up of 14336 numbers each, of two bytes
    assert long_prompt_plot([]) is None
