"""Tables of an evicting cache say what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cache import keeping, keeping_report, offload, quoted
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


def answers(policy: str, asked: str, share: float, right: int) -> dict[str, Any]:
    facts = {"model_sha256": "m", "text_sha256": "t", "length": 32768}
    return record("eviction_answers", policy=policy, asked=asked, share=share, right=right, questions=96, **facts)


def stream(positions: str, nll: list[float], **policy: str) -> dict[str, Any]:
    facts = {"model_sha256": "m", "text_sha256": "t", "sinks": 4, "window": 2048, "stretch": 20000}
    return record("eviction_stream", positions=positions, nll=nll, **facts, **policy)


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
    streams = [stream("absolute", [0.7]), stream("absolute", [0.6], policy="streaming_llm") | later]
    found = [token("sparsify", 6.4), token("sparsify", 5.6, tuned=False) | later, *streams]
    text = tables_cache.table(found)
    assert "| 5.60 | 6.60 |" in text and "6.40" not in text
    assert "| 2052 | streaming_llm, absolute | 0.600 | 0.600 |" in text and "0.700" not in text


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
    cells = [answers("full", "end", 1.0, 92), answers("h2o", "end", 0.05, 48), answers("h2o", "blind", 0.05, 80)]
    end, blind = tables_cache.table(cells).split("Asked after the policy has chosen")
    assert "| 32K | full | 0.96 [0.90, 0.98] | – |" in end and "| 32K | h2o | – | 0.50 [0.40, 0.60] |" in end
    assert "| 32K | h2o | – | 0.83 [" in blind.split("Another question")[0]
    text = tables_cache.table(
        [stream("in_cache", [0.66, 0.3]), stream("recomputed", [0.6, 0.3]), stream("absolute", [0.9, 0.3], policy="h2o")]
    )
    assert "| 2052 | no cache | 0.450 | 0.600 | 0.300 |" in text
    assert "| 2052 | streaming_llm, in_cache | 0.480 | 0.660 (1.100) | 0.300 (1.000) |" in text
    assert "| 2052 | h2o | 0.600 | 0.900 (1.500) | 0.300 (1.000) |" in text


def test_missed_goals_are_listed_and_met_ones_are_not() -> None:
    everything = answers("full", "blind", 1.0, 96)
    met = [token("sparsify", 5.0), prompt("snapkv", 10.0), PREFILL, everything, answers("pages", "blind", 0.05, 94)]
    assert tables_cache.shortfalls(met) == []
    missed = [token("sparsify", 6.39), prompt("snapkv", 20.0), PREFILL, everything, answers("pages", "blind", 0.05, 90)]
    lines = "\n".join(tables_cache.shortfalls(missed))
    assert "takes 6.39 ms; 5.5 was the goal" in lines and "take 4.0% of the fastest prefill of 32K" in lines
    assert "5% of the pages of 32K bytes (blind) answer 90 of 96; everything read, 1.00 of them" in lines
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


def test_a_prompt_in_a_file_beside_its_limits_and_beside_computing_it_again() -> None:
    facts = {"shape": "8b", "layers": 32, "length": 131072, "variant": "16 bits", "bytes": 16 * 2**30, "peak_bytes": 2**28}
    save = record("cache_keeping", operation="save", seconds=2.5, file_seconds=2.0, bus_seconds=0.3, **facts)
    load = record("cache_keeping", operation="load", seconds=3.5, file_seconds=2.0, bus_seconds=0.3, **facts)
    exact = record("prefill", shape="8b", layers=32, length=131072, variant="dense", ms=10_000.0)
    text = keeping_report.table([save, load, exact])
    assert "| 8b | 128K | 16 bits, to a file | 16.00 | 2.50 | 6.9 | 2.00 | 0.30 | 25% of 10.0 s | 0.25 |" in text
    assert "| 8b | 128K | 16 bits, from a file | 16.00 | 3.50 |" in text
    held = {"shape": "8b", "layers": 2, "length": 16384, "slots": 4096, "promised_bytes": 2**24}
    weighed = [record("cache_memory", variant=name, kept_bytes=kept, **held) for name, kept in (("snapkv", 2**24), ("adakv", 18 * 2**20))]
    assert "| adakv | 4K | 16.00 | 18.00 | 1.125 | – |" in keeping_report.table(weighed)
    assert keeping_report.shortfalls([save, load, exact, *weighed]) == [
        "128K tokens from a file (16 bits) take 3.50 s, 1.8 × the time of the file or the bus.",
        "A cache under adakv of 4096 tokens takes 1.125 times their bytes.",
    ]
    assert keeping_report.headlines([save, exact]) == [
        ["a prompt of 128K tokens to a file, 8B shape, 16 bits", "2.50 s, 16.0 GiB", "computing it again, exact: 10.0 s"]
    ]


def test_what_the_page_about_caches_quotes() -> None:
    cells = [answers("full", "end", 1.0, 96), answers("h2o", "end", 0.05, 48), answers("h2o", "blind", 0.02, 24)]
    text = quoted.answers(cells)
    assert "| `h2o` | – | 0.50 | – | – | – | 0.25 |" in text and "everything kept answers 1.00 and – of them" in text
    facts = {"shape": "8b", "length": 131072, "batch": 8}
    steps = [
        record("decode_reading", variant=name, ms=ms, ms_all_layers=32 * ms, bytes_read=read, **facts)
        for name, ms, read in (("16 bits", 1.0, 400), ("clusters 0.05", 0.2, 30))
    ]
    assert "| clusters 0.05 | 6.40 | 0.20 for 0.07 |" in quoted.reading(steps)
    facts = {"shape": "8b", "layers": 32, "length": 131072, "variant": "fp8", "bytes": 2**33, "bus_seconds": 0.2}
    kept = [record("cache_keeping", operation=name, seconds=s, file_seconds=1.0, **facts) for name, s in (("save", 2.0), ("load", 1.5))]
    assert "| fp8 | 8.0 | 2.00 | 1.00 | 1.50 | 1.00 |" in quoted.keeping(kept)
    assert quoted.answers([]) == quoted.reading([]) == quoted.keeping([]) == ""


@pytest.mark.slow
def test_keeping_runs_tiny(tmp_path: Path) -> None:
    out, small = tmp_path / "keeping.jsonl", "--shape tiny --length 512 --memory-length 512 --budget 128 --device cpu --times 1"
    assert keeping.main([*small.split(), "--folder", str(tmp_path), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    kept = [one for one in found if one["benchmark"] == "cache_keeping"]
    assert [(one["variant"], one["operation"]) for one in kept] == [
        *((name, operation) for name in ("16 bits", "fp8", "int4", "snapkv") for operation in ("save", "load")),
        ("clusters", "prepare"),
    ]
    assert kept[0]["bytes"] > 2 * kept[2]["bytes"] > 2 * kept[4]["bytes"] and all(one["seconds"] > 0 for one in kept)
    assert [path.name for path in tmp_path.iterdir()] == ["keeping.jsonl"]
    weighed = {one["variant"]: one["kept_bytes"] / one["promised_bytes"] for one in found if one["benchmark"] == "cache_memory"}
    assert len(weighed) == 22 and all(1 < over < 1.45 for over in weighed.values())


@pytest.mark.slow
def test_offloading_runs_tiny(tmp_path: Path) -> None:
    out = tmp_path / "decode.jsonl"
    assert offload.main(["--shape", "tiny", "--lengths", "64", "--tokens", "2", "--warmup", "1", "--device", "cpu", "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["variant"] for one in found] == list(offload.VARIANTS) and all(one["ms"] > 0 for one in found)
    assert found[1]["host_bytes"] > 0 and found[0]["host_bytes"] == 0
