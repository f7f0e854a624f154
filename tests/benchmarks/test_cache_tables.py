"""Tables of an evicting cache say what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cache import offload
from benchmarks.cache import report as tables_cache

MACHINE = {"gpu": "H200", "commit": "a" * 40, "torch": "2.11"}


def record(benchmark: str, **values: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "time": "2026-01-01T00:00:00+00:00", "machine": MACHINE, **values}


def token(variant: str, ms: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    sparse = {"policy": "snapkv", "budget": 4096, "kept_over_budget": 1.008} if variant == "sparsify" else {"policy": None, "budget": None}
    facts = {"shape": "8b", "layers": 32, "mode": "reduce-overhead", "batch": batch, "prompt": 131072, "peak_bytes": 2**34}
    return record("decode_model", variant=variant, ms_per_token=ms, ms_per_token_read_back=ms + 1, **facts, **sparse, **more)


def prompt(policy: str | None, store_ms: float) -> dict[str, Any]:
    sizes = {"peak_bytes": 20 * 2**30, "weight_bytes": 15 * 2**30, "cache_bytes": 2**29}
    facts = {"shape": "8b", "layers": 32, "length": 32768, "batch": 1, "policy": policy, "budget": 4096 if policy else None}
    return record("cache_prefill", ms=1000.0, store_ms=store_ms, kept_over_budget=1.008 if policy else None, **facts, **sizes)


PREFILL = record("prefill", shape="8b", layers=32, length=32768, variant="xattention", ms=500.0)


def needles(share: float, right: int, kernel: int) -> dict[str, Any]:
    facts = {"model_sha256": "m", "text_sha256": "t", "policy": "snapkv", "length": 32768, "window": 12}
    return record("eviction_needles", share=share, right=right, asked=48, kernel=kernel, **facts)


def stream(positions: str, nll: list[float]) -> dict[str, Any]:
    facts = {"model_sha256": "m", "text_sha256": "t", "sinks": 4, "window": 2048, "stretch": 20000}
    return record("eviction_stream", positions=positions, nll=nll, **facts)


def test_tokens_beside_everything_kept() -> None:
    text = tables_cache.table([token("sparsify", 5.0), token("static+inductor", 54.0)])
    assert "| 8b | 128K | 1 | SparseCache, sparsify | snapkv, 4096 | 5.00 | 6.00 | 1.008 | 16.0 |" in text
    assert "| 8b | 128K | 1 | StaticCache, Inductor | everything | 54.00 | 55.00 | – | 16.0 |" in text


def test_a_record_that_read_every_token_back_is_not_shown_as_a_loop() -> None:
    old = token("sparsify", 6.4)
    del old["ms_per_token_read_back"]
    assert "| – | 6.40 |" in tables_cache.table([old])


def test_early_records_give_way_to_later_ones_of_their_cell() -> None:
    later = {"time": "2026-01-02T00:00:00+00:00"}
    found = [token("sparsify", 6.4), token("sparsify", 5.6, tuned=False) | later, needles(0.05, 20, 5), needles(0.05, 24, 5) | later]
    del found[2]["kernel"]
    text = tables_cache.table(found)
    assert "| 5.60 | 6.60 |" in text and "6.40" not in text and text.count("kernel 5") == 1 and "| 0.50 [" in text


def test_scoring_is_a_share_of_its_own_and_of_the_fastest_prefill() -> None:
    text = tables_cache.table([prompt("snapkv", 20.0), prompt(None, 0.0), PREFILL])
    assert "| 32K | snapkv, 4096 | 1000 | 20.0 | 2.0% | 4.0% (xattention) | 5.0 | 0.50 |" in text
    assert "| 32K | everything | 1000 | – | – | – | 5.0 | 0.50 |" in text


def test_several_tokens_beside_sdpa() -> None:
    facts = {"batch": 1, "count": 5, "length": 131072, "ms": 0.25, "tflops": 40.0}
    text = tables_cache.table(
        [record("decode_append", variant="sparsify", error=1e-3, **facts), record("decode_append", variant="sdpa", **facts)]
    )
    assert "| 128K | 5 | 1 | sparsify | 0.250 | 40 | 1.0e-03 |" in text and "| 128K | 5 | 1 | SDPA, every key visible |" in text


def test_answers_by_share_and_text_over_its_recomputation() -> None:
    text = tables_cache.table([needles(1.0, 46, 5), needles(0.05, 24, 5), needles(0.05, 40, 15)])
    assert "| 32K | snapkv, window 12, kernel 5 | 0.96 [0.86, 0.99] | 0.50 [0.36, 0.64] |" in text
    assert "| 32K | snapkv, window 12, kernel 15 | – | 0.83 " in text
    text = tables_cache.table([stream("in_cache", [0.66, 0.3]), stream("recomputed", [0.6, 0.3])])
    assert "| 4 + 2048 | recomputed | 0.600 | 0.300 |" in text and "| 4 + 2048 | in_cache | 0.660 (1.100) | 0.300 (1.000) |" in text


def test_missed_goals_are_listed_and_met_ones_are_not() -> None:
    met = [token("sparsify", 5.0), prompt("snapkv", 10.0), PREFILL, needles(1.0, 46, 5), needles(0.25, 46, 15)]
    assert tables_cache.shortfalls(met) == []
    missed = [token("sparsify", 6.39), prompt("snapkv", 20.0), PREFILL, needles(1.0, 46, 5), needles(0.05, 24, 5), needles(0.05, 40, 15)]
    lines = "\n".join(tables_cache.shortfalls(missed))
    assert "takes 6.39 ms; 5.5 was the goal" in lines and "take 4.0% of the fastest prefill of 32K" in lines
    assert "(kernel 15) answers 40 of 48" in lines and "24" not in lines
    rows = report.headlines([token("sparsify", 5.0), token("static+inductor", 54.0)])
    mine = "| a token of an 8B model after 128K, 4096 kept, batch 1 | 5.00 ms, 6.00 with each token read back |"
    assert f"{mine} Inductor, every key kept: 54.0 ms |" in rows
    early = {name: value for name, value in token("static+inductor", 54.0).items() if name != "ms_per_token_read_back"}
    assert "Inductor, every key kept, each token read back: 54.0 ms |" in report.headlines([token("sparsify", 5.0), early])


def test_offloaded_tokens_beside_the_bus() -> None:
    facts = {"shape": "8b", "layers": 32, "length": 131072, "limit_ms": 312.5}
    found = [
        record("decode_offloaded", variant="offloaded", ms=330.0, cache_bytes=2**30, host_bytes=16 * 2**30, peak_bytes=20 * 2**30, **facts),
        record("decode_offloaded", variant="transformers", error="out of memory", **facts),
    ]
    text = tables_cache.offloaded_table(found)
    assert "| 8b | 128K | offloaded | 330.00 | 312.50 | 1.00 | 16.00 | 20.00 |" in text
    assert "| 8b | 128K | transformers | failed: out of memory | 312.50 | – | – | – |" in text


@pytest.mark.slow
def test_offloading_runs_tiny(tmp_path: Path) -> None:
    out = tmp_path / "decode.jsonl"
    assert offload.main(["--shape", "tiny", "--lengths", "64", "--tokens", "2", "--warmup", "1", "--device", "cpu", "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["variant"] for one in found] == list(offload.VARIANTS) and all(one["ms"] > 0 for one in found)
    assert found[1]["host_bytes"] > 0 and found[0]["host_bytes"] == 0
