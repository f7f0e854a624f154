"""Benchmark records say where they come from, and tables say what the records say."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.answers import run
from benchmarks.lib import records
from benchmarks.model import long_prompt, prefill
from benchmarks.model.report import generate_seconds_table, long_prompt_table

MACHINE = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "commit": "0123456789abcdef",
}


def answer(**changes: object) -> dict:
    base = {
        "benchmark": "answers", "time": "2026-01-01T00:00:00+00:00", "machine": MACHINE, "model": "m", "model_sha256": "a" * 64,
        "text_sha256": "b" * 64, "method": "dense", "parameters": {}, "length": 8192, "needles": 32, "seeds": [0, 12], "dtype": "bfloat16",
        "right": 190, "asked": 192, "density": 1.0, "nll": 0.527,
    }  # fmt: skip
    return base | changes


def time_of(**changes: object) -> dict:
    base = {
        "benchmark": "prefill", "time": "2026-01-01T00:00:00+00:00", "machine": MACHINE, "shape": "8b", "layers": 32, "variant": "eager",
        "length": 4096, "requested_density": None, "ms": 200.0, "peak_bytes": 1 << 34, "density": None,
    }  # fmt: skip
    return base | changes


def write(folder: Path, *found: dict) -> None:
    (folder / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


@dataclass(frozen=True, kw_only=True)
class Some(records.Record):
    NAME = "some"
    value: float
    told: int | None = field(default_factory=lambda: None)
    absent: int | None = None
    more: dict = field(default_factory=dict)


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    records.append(path, Some(value=1))
    records.append(path, Some(value=2, more={"extra": 3}))
    found = list(records.read([path]))
    assert [(record["benchmark"], record["value"], record.get("extra")) for record in found] == [("some", 1, None), ("some", 2, 3)]
    assert all("absent" not in record and record["told"] is None for record in found)
    machine = found[0]["machine"]
    assert {"torch", "triton", "transformers", "sparsify", "gpu", "driver", "commit"} <= machine.keys()
    assert machine["torch"] and machine["sparsify"] and machine["transformers"]


def test_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    records.code_version.cache_clear()
    monkeypatch.setenv(records.COMMIT_VARIABLE, "abc")
    assert records.code_version() == "abc"
    records.code_version.cache_clear()


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        records.append(tmp_path / "x.jsonl", Some(value=float("nan")))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"benchmark": "x"}'])
def test_broken_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    write(tmp_path, answer())
    path.write_text(json.dumps(answer()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2 is no record"):
        list(records.read([path]))


def test_digest_of_a_model_follows_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"abc")
    first = records.sha256(model)
    (model / "README.md").write_text("words change nothing")
    assert records.sha256(model) == first
    shutil.copytree(model, tmp_path / "copy")
    assert records.sha256(tmp_path / "copy") == first
    (model / "model.safetensors").write_bytes(b"abd")
    assert records.sha256(model) != first
    # bytes that move from one file to the next are another model
    (tmp_path / "copy" / "config.json").write_bytes(b"{}a")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"bc")
    assert records.sha256(tmp_path / "copy") != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        records.sha256(tmp_path / "empty")


def test_the_latest_record_of_a_cell_counts(tmp_path: Path) -> None:
    early, late = answer(right=100), answer(right=192, time="2026-02-01T00:00:00+00:00")
    other = answer(right=96, method="xattention", parameters={"stride": 8, "pool": "max", "threshold": 0.9}, density=0.067)
    write(tmp_path, late, early, other)
    page = report.page(tmp_path)
    assert "| sparsify, dense | 1.000 [0.98, 1.00] · 100.0% · 0.527 |" in page
    assert "| xattention, max, stride 8, τ 0.9 | 0.500 [0.43, 0.57] · 6.7% · 0.527 |" in page
    assert "0.521" not in page  # 100 of 192
    assert "NVIDIA H200" in page and "commit 0123456789." in page
    write(tmp_path, late | {"machine": MACHINE | {"commit": MACHINE["commit"] + "+changes"}})
    assert "commit 0123456789+changes." in report.page(tmp_path)


def test_missing_and_failed_cells_stay_visible(tmp_path: Path) -> None:
    failed = {key: value for key, value in answer(length=16384).items() if key not in {"right", "asked", "density", "nll"}}
    window = answer(method="sink_window", parameters={"sinks": 128, "window": 2048})
    write(tmp_path, answer(), failed | {"error": "KernelError: a | b"}, window)
    page = report.page(tmp_path)
    assert "failed: KernelError: a / b" in page
    assert page.split("sink_window, 128 + 2048 tokens")[1].splitlines()[0].endswith("| – |")


def test_machines_and_models_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, answer(), answer(machine=MACHINE | {"gpu": None}, right=12), answer(model_sha256="c" * 64, right=24))
    assert report.page(tmp_path).count("### m (bfloat16)") == 3


def test_prefill_table_compares_with_eager(tmp_path: Path) -> None:
    sparse = time_of(variant="xattention", requested_density=0.1, ms=100.0, density=0.11)
    failed = time_of(variant="inductor", error="OutOfMemoryError: no")
    failed.pop("ms")
    write(tmp_path, time_of(), sparse, failed)
    page = report.page(tmp_path)
    assert "| 4K | eager | 200.0 | 1.00 | 16.0 | – |" in page
    assert "| 4K | xattention, density 0.1 | 100.0 | 2.00 | 16.0 | 11.0% |" in page
    assert "| 4K | Inductor | failed: OutOfMemoryError: no |" in page


def test_check_notices_an_edited_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, answer(), time_of())
    assert report.main(["--folder", str(tmp_path)]) == 0
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--folder", str(tmp_path), "--check"]) == 0
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("0.990", "1.000"))
    assert report.main(["--folder", str(tmp_path), "--check"]) == 1


def test_committed_tables_are_what_the_records_say() -> None:
    if not list(records.RESULTS.glob("*.jsonl")):
        pytest.skip("no results are recorded yet")
    assert report.main(["--check"]) == 0


def test_cells_of_the_answer_benchmark() -> None:
    found = run.cells([0.8, 0.9], [8, 16], ["sum", "max"], 128, [2048])
    assert len(found) == 2 + 8 + 1
    assert len({repr(cell) for cell in found}) == len(found)
    assert all(cell["options"] is None or cell["options"]["strict"] for cell in found)


def test_sink_window_density_counts_visible_pairs() -> None:
    length, sinks, window = 50, 3, 7
    visible = sum(key < sinks or key > row - window for row in range(length) for key in range(row + 1))
    assert run.sink_window_density(length, sinks, window) == pytest.approx(visible / (length * (length + 1) / 2))


def test_prefill_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    assert (
        prefill.main(["--shape", "tiny", "--device", "cpu", "--lengths", "300", "--variants", "eager", "--repeats", "1", "--out", str(out)])
        == 0
    )
    (record,) = records.read([out])
    assert record["variant"] == "eager"
    assert len(record["times_ms"]) == 2
    assert record["same_token"] and record["logits_error"] == 0
    assert record["parameters"] > 100_000


@pytest.mark.slow
def test_long_prompts_run_on_a_cpu_in_parts_and_whole(tmp_path: Path) -> None:
    out = tmp_path / "long_prompt.jsonl"
    sizes = ["--device", "cpu", "--layers", "2", "--hidden", "64", "--shape", "tiny", "--lengths", "512", "--repeats", "1"]
    parts = ["--min-rows", "128", "--part-rows", "100", "--budget", "256", "--density", "0.3", "--variants", "parts", "whole"]
    assert long_prompt.main([*sizes, *parts, "--out", str(out)]) == 0
    in_parts, whole = records.read([out])
    assert (in_parts["variant"], in_parts["blocks_in_parts"], whole["variant"], whole["blocks_in_parts"]) == ("parts", 2, "whole", 0)
    assert in_parts["s"] > 0 and in_parts.get("peak_bytes") is None and in_parts["graphs"] == 1
    assert "| parts |" in long_prompt_table([in_parts, whole]) and "| parts |" not in long_prompt_table([whole])


def test_the_table_of_long_prompts() -> None:
    facts = {
        "benchmark": "long_prompt",
        "machine": MACHINE,
        "time": "2026-01-01T00:00:00+00:00",
        "shape": "8b",
        "layers": 32,
        "length": 1 << 20,
    }
    facts |= {"budget": 8192, "density": 0.03, "allocator": "", "weight_bytes": 15 << 30}
    times = {"s": 44.0, "first_call_s": 61.0, "peak_bytes": 60 << 30, "first_reserved_bytes": 70 << 30}
    lines = long_prompt_table([facts | times | {"variant": "parts"}, facts | {"variant": "whole", "error": "out of memory"}]).splitlines()
    assert lines[-2].startswith("| 1024K | 3% | parts | – | 44.00 | 61.0 | 60.0 | 70.0 | 15.0 |") and "out of memory" in lines[-1]


def test_the_table_of_first_prompts() -> None:
    facts = {
        "benchmark": "generate_seconds", "layers": 32, "hidden": 4096, "length": 4096, "tokens": 32, "exact": True, "machine": MACHINE,
        "time": "2026-01-01T00:00:00+00:00",
        "first_s": 20.0, "again_s": 0.5, "beyond_s": 19.5, "lengths": [500, 900, 700], "prompts_s": [3.0, 1.0, 2.0], "graphs": 2,
    }  # fmt: skip
    lines = generate_seconds_table([facts | {"way": way, "state": "cold"} for way in ("regions", "eager")]).splitlines()
    rows = [line for line in lines if line.startswith("| 32 |")]
    assert ["uncompiled" in row for row in rows] == [True, False]
    assert "| 20.00 | 0.50 | 19.50 | 6.0 | 2.00 | 2 |" in rows[1] and "(500 to 900)" in "".join(lines)
