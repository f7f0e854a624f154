"""Tables of kernels, decode and feed-forward skipping, and the lines that other texts quote, say what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.answers import report as answers
from benchmarks.attention import report as attention
from benchmarks.cache import report as cache
from benchmarks.ffn import report as ffn
from benchmarks.lib import pages
from benchmarks.model import report as model
from benchmarks.whole_op import report as whole_op

MACHINE = {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "commit": None}


def record(benchmark: str, **values: object) -> dict:
    return {"benchmark": benchmark, "time": "2026-01-01T00:00:00+00:00", "machine": MACHINE, **values}


def kernel(case: str, section: str = "table", **values: object) -> dict:
    return record("kernels", section=section, case=case, **values)


@pytest.fixture(autouse=True)
def default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records here are of the same default whatever today's is."""
    for name, value in {"pool": "max+pair+int8", "stride": 8, "threshold": 0.95}.items():
        monkeypatch.setitem(answers.DEFAULT, name, value)


SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "length": 131072}
DENSE = kernel("dense_128k", ours_ms=220.0, ours_tflops=640, fa4_ms=200.0, fa4_tflops=704, cudnn_ms=250.0, cudnn_tflops=563, ratio=0.909)
SPARSE = kernel("sparse_128k_.05", density=0.0537, ours_ms=12.8, ours_tflops=528, fa4_absent="TypeError: a|b", flex_absent="TypeError: c")
WINDOW = kernel("sink_window_128k", ours_ms=15.0, ours_tflops=575, fa4_ms=201.0, fa4_tflops=700, ratio=13.4)
WHOLE = [
    record("whole_op", **SHAPE, kind="dense", name="fa4", error="ModuleNotFoundError: no flash_attn"),
    record("whole_op", **SHAPE, kind="dense", name="cudnn", ms=250.0),
    record("whole_op", **SHAPE, kind="dense", name="ours, dense", ms=210.0),
    record("whole_op", **SHAPE, kind="sparse", stride=8, pool="max+pair+int8", target=0.07, threshold=0.9, density=0.07, ms=25.0,
           select_ms=8.0, attend_ms=16.0, speedup=10.0, speedups={"cudnn": 10.0}, bound=9.9, kept_mass=0.88, scratch_bytes=1 << 26),
]  # fmt: skip
DECODE = [
    record("decode_kernel", variant=variant, batch=1, length=131072, share=share, ms=ms, gb_per_s=speed, share_of_copy=speed / 2500.0)
    for variant, share, ms, speed in (("cudnn", 1.0, 0.1, 5000.0), ("sparsify", 1.0, 0.125, 4000.0), ("sparsify", 0.05, 0.08, 312.0))
]
FFN = [
    record("ffn-stack", variant=variant, rows=rows, share=share, pattern=pattern, ms=ms, bytes=10**10, bandwidth=2.5e12)
    for variant, rows, share, pattern, ms in (
        ("inductor", 1, 0.0, "all rows", 4.4),
        ("sparsify", 1, 0.0, "all rows", 4.0),
        ("sparsify", 1, 0.25, "all rows", 3.1),
        ("sparsify", 8, 0.0, "all rows", 4.0),
        ("sparsify", 8, 0.25, "each row by itself", 3.99),
    )
]


def test_absent_peers_and_failed_cases_stay_visible() -> None:
    text = attention.table([DENSE, SPARSE, kernel("chunk", error="hung | killed")])
    assert "| `dense_128k` | dense | 220.00 (640) | 200.00 (704) | 250.00 (563) | – | 0.91 |" in text
    assert "| `sparse_128k_.05` | 5.4% | 12.80 (528) | failed: TypeError: a/b | – | failed: TypeError: c | no peer ran |" in text
    assert "failed: hung / killed" in text
    assert "commit unknown." in text


def test_failed_checks_are_counted_and_named() -> None:
    passed = kernel("ragged", "check", ok=True, served=True, error=0.002)
    failed = kernel("window", "check", ok=False, served=True, problems="error 3.00e-01", error=0.3)
    text = attention.table([passed, failed, kernel("hung", "check", error="said nothing for 120 s")])
    assert "1 of 3 checks passed; largest relative error of an output 2.0e-03." in text
    assert "- `window`: failed: error 3.00e-01" in text and "- `hung`: failed: said nothing" in text


def test_the_fastest_dense_kernel_is_looked_for_in_every_record_of_the_device() -> None:
    other = {**DENSE, "machine": {**MACHINE, "gpu": "another"}, "fa4_ms": 1.0}
    assert whole_op.fastest_dense([*WHOLE, other], "NVIDIA H200") == {131072: (210.0, "sparsify", "whole_op")}
    assert whole_op.fastest_dense([*WHOLE, DENSE, other], "NVIDIA H200") == {131072: (200.0, "FlashAttention-4", "kernels")}
    # sparsify's windowed time is no dense time, its peers' are
    assert whole_op.fastest_dense([WINDOW], "NVIDIA H200") == {131072: (201.0, "FlashAttention-4", "kernels")}
    narrow = {**WHOLE[1], "head_dim": 64, "ms": 1.0}
    assert whole_op.fastest_dense([narrow, SPARSE], "NVIDIA H200") == {}


def test_a_speed_up_over_the_runs_peers_is_not_the_only_one() -> None:
    alone, beside = whole_op.table(WHOLE), whole_op.table([*WHOLE, DENSE])
    assert "| 25.00 (8.00 + 16.00) | 10.00 | 8.40 |" in alone
    assert "| 25.00 (8.00 + 16.00) | 10.00 | 8.00 |" in beside
    assert "**FlashAttention-4 did not run there**" in beside and "128K: FlashAttention-4, 200.0 ms" in beside
    assert "| 128K | dense: FlashAttention-4 | failed: ModuleNotFoundError: no flash_attn |" in beside


def test_decode_is_compared_with_the_fastest_full_read() -> None:
    text = cache.decode_table(DECODE)
    assert "| 128K | 1 | sparsify | 5% | 0.080 | 312 | 0.80 | – |" in text
    assert "| 128K | 1 | cuDNN | 100% | 0.100 | 5000 | 1.00 | – |" in text
    assert "moved 2500 GB/s" in text


def test_saved_time_of_skipped_blocks() -> None:
    text = ffn.table(FFN)
    assert "| 1 | sparsify, all rows | 25% | 3.100 | 0.70 | 90% | 3.00 |" in text  # 0.9 ms of 1 ms
    assert "| 8 | sparsify, each row by itself | 25% | 3.990 | – | 1% |" in text
    whole = [{**one, "benchmark": "ffn-model", "ms": one["ms"] + 5} for one in FFN[:3]]
    assert "| 1 | sparsify, all rows | 25% | 8.100 | 0.86 | 90% |" in ffn.table(whole)
    assert ffn.ffn_saved([*whole, *FFN], {**whole[2], "ms": 8.5}) == pytest.approx(0.5)  # of the 4 ms that the blocks take alone
    assert ffn.ffn_saved(whole, whole[2]) == pytest.approx(0.9)  # a quarter of 10 GB at 2.5 TB/s is 1 ms


def test_headlines_quote_the_stricter_speed_up_and_only_estimates_with_known_answers() -> None:
    quick = {**WHOLE[3], "pool": "max+group", "ms": 12.5, "speedup": 20.0, "speedups": {"cudnn": 20.0}}
    found = [*WHOLE, quick, DENSE, SPARSE, WINDOW, *DECODE, *FFN]
    text = report.headlines(found)
    assert "8.0 × the fastest dense kernel measured (FlashAttention-4), 10.0 × cuDNN in the same run" in text
    assert "max+group" not in text
    assert "4000 GB/s | cuDNN 5000 |" in text and "0.91 × the fastest peer" in text
    lines = report.shortfalls(found)
    assert "effect on the answers of long prompts is not recorded: max+group at stride 8, max+pair+int8 at stride 8." in lines
    assert (
        "`sparse_128k_.05` (5.4% of the blocks): 528 TFLOP/s, 75% of the rate of the fastest dense kernel (704). No block-sparse" in lines
    )
    assert "Decode over 5% of 128K slots takes 0.080 ms, 80% of a full read and not 5%." in lines
    assert "8 rows, each row by itself, 25% skipped: 1%" in lines and "1 rows" not in lines
    # on a CPU, or without records, there is nothing to quote
    cpu = [{**one, "machine": {**MACHINE, "gpu": None}} for one in found]
    assert report.headlines(cpu) == report.shortfalls([]) == "No results are recorded yet."


def test_lost_answers_are_a_shortfall() -> None:
    facts = {"model_sha256": "a", "length": 8192, "seeds": [0, 1], "asked": 100, "density": 0.2}
    eager = record("answers", method="eager", parameters={}, right=90, **facts)
    lossy = record("answers", method="xattention", parameters={"stride": 8, "pool": "max+pair+int8", "threshold": 0.95}, right=80, **facts)
    assert "80 of 100" in report.shortfalls([eager, lossy])
    assert report.shortfalls([eager, {**lossy, "right": 90}]) == "No results are recorded yet."
    assert "| 90 of 100" in report.headlines([eager, {**lossy, "right": 90}])


def test_the_readmes_answers_are_of_the_same_questions() -> None:
    facts = {"model_sha256": "a", "length": 8192, "seeds": [0, 1], "asked": 100}
    eager = record("answers", method="eager", parameters={}, right=90, density=1.0, **facts)
    default = record("answers", method="xattention", parameters=answers.DEFAULT, right=80, density=0.2, **facts)
    other = {**default, "seeds": [2, 3], "right": 7, "asked": 99}
    windows = [
        record("answers", method="sink_window", parameters={"window": size}, right=right, density=share, **facts)
        for size, right, share in ((10, 30, 0.25), (20, 70, 0.9))
    ]
    assert report.answers([eager, default, other, *windows]).splitlines()[2:] == [
        "| 8K bytes | 90 of 100 [83%, 94%] | 80 of 100 [71%, 87%]; 20% of all pairs | 30 of 100 [22%, 40%]; 25% of all pairs |"
    ]
    assert report.answers([eager, other]) == report.answers([]) == "No results are recorded yet."


def test_whole_calls_that_were_not_timed_are_added_up_and_say_so() -> None:
    call = {"shape": "8b", "layers": 32, "length": 131072}
    token = {**call, "batch": 1, "sampled": False, "padded": False}
    found = [
        record("prefill", variant="eager", requested_density=None, ms=11000.0, **call),
        record("generate", variant="eager", ms=20.0, tokens=64, **token),
        record("generate", variant="inductor", ms=50.0, tokens=64, **token),
        record("generate", variant="sparsify", ms=9.0, tokens=64, **token),
        record("generate", variant="sparsify", ms=8.0, tokens=200, whole_s=11.0, **token),
        record("generate", variant="sparsify sparse", ms=8.0, tokens=200, whole_s=6.0, density=0.1, **token),
    ]
    found_call, bars = model.whole_call_bars(found) or pytest.fail("no whole call")
    assert found_call["tokens"] == 200
    assert [(bar.prompt, bar.tokens, bar.timed) for bar in bars] == [
        pytest.approx(bar) for bar in [(11.0, 4.0, False), (11.0, 10.0, False), (9.4, 1.6, True), (4.4, 1.6, True)]
    ]
    timed = record("generate", variant="eager", ms=20.0, tokens=200, whole_s=14.5, **token)
    _, bars = model.whole_call_bars([*found, timed]) or pytest.fail("no whole call")
    assert (bars[0].prompt, bars[0].timed) == (pytest.approx(10.5), True)
    assert model.whole_call_bars(found[:4]) is None


def test_a_quick_estimate_is_quoted_only_when_it_keeps_the_exact_ones_answers() -> None:
    facts = {"method": "xattention", "model_sha256": "a", "length": 8192, "seeds": [0, 1], "asked": 100, "density": 0.2}
    right = {"max": 90, "max+pair+int8": 90, "max+group": 88}
    keeping = lambda found: {estimate for estimate, lost in answers.lost(found).items() if lost <= answers.FEW_LOST}
    asked = [
        record("answers", parameters={"stride": 8, "pool": pool, "threshold": 0.95}, right=count, **facts) for pool, count in right.items()
    ]
    cells = [{**WHOLE[3], "pool": pool, "ms": ms} for pool, ms in (("max", 30.0), ("max+pair+int8", 25.0), ("max+group", 20.0))]
    assert keeping(asked) == {("max", 8), ("max+pair+int8", 8)}
    longer = record("answers", parameters={"stride": 8, "pool": "max", "threshold": 0.95}, right=90, **{**facts, "length": 16384})
    assert keeping([*asked, longer]) == {("max", 8)}, "the longest prompts were not asked of the others"
    text = report.headlines([*WHOLE[:3], *cells, *asked])
    assert "25.0 ms, max+pair+int8, stride 8 (default estimate)" in text and "max+group" not in text
    assert "lose more than one answer in a hundred to the exact one of their stride: max+group" in report.shortfalls(
        [*WHOLE[:3], *cells, *asked]
    )


def test_marked_parts_are_filled_and_missing_marks_are_refused() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert pages.filled(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    for broken in ("", text + text, "<!-- /x --> <!-- x -->"):
        with pytest.raises(ValueError, match="once each"):
            pages.filled(broken, "x", "new")


def test_every_section_and_record_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [*WHOLE, DENSE, SPARSE, *DECODE, *FFN, record("new-benchmark"), record("ffn-tilings")]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    assert report.main(["--folder", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    for section in ("The whole sparse attention call", "Attention kernels", "Decode over kept keys", "Feed-forward skipping"):
        assert f"## {section}\n" in page
    for picture in ("whole_op", "kernels", "ffn-time"):
        assert f"]({picture}.png)" in page and (tmp_path / f"{picture}.png").stat().st_size > 1000
    assert page.endswith("## Records without a table\n\n`new-benchmark`\n")


def test_check_notices_a_stale_quotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    (tmp_path / "docs").mkdir()
    results.mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report.records, "RESULTS", results)
    (results / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (DENSE, *DECODE)))
    for path, name, _ in report.MARKED:
        with (tmp_path / path).open("a") as page:
            page.write(f"<!-- {name} -->\n<!-- /{name} -->\n")
    check = ["--folder", str(results), "--check"]
    assert report.main(check) == 1
    for path, text in report.texts(results).items():
        path.write_text(text)
    assert report.main(check) == 0
    quoted = tmp_path / "docs" / "benchmarks.md"
    quoted.write_text(quoted.read_text().replace("0.91", "1.09"))
    assert report.main(check) == 1


def test_tokens_slower_than_their_bytes_are_told_with_what_the_gpu_does() -> None:
    facts = {"shape": "8b", "layers": 32, "length": 16384, "batch": 8, "padded": True, "sampled": False, "tokens": 64, "limit_ms": 6.0}
    found = [
        record("generate", variant="sparsify", ms=7.8, gpu_ms={"products": 3.5, "attention": 3.25, "other": 0.75}, **facts),
        record("generate", variant="sparsify", ms=6.5, **{**facts, "length": 1024}),  # near enough
        record("generate", variant="eager", ms=100.0, **facts),  # not ours
    ]
    assert model.generate_shortfalls(found) == [
        "A token through generate() (16K, batch 8, padded, 64 tokens): 7.80 ms, 1.30 × the time of its bytes; "
        "the GPU is busy for 7.50 ms of it (products 3.50, attention 3.25, other 0.75)."
    ]


def test_reading_less_that_takes_as_long_is_a_shortfall() -> None:
    facts = {"shape": "8b", "length": 131072, "batch": 8}
    found = [
        record("decode_reading", variant="16 bits", ms=1.0, bytes_read=4000, **facts),
        record("decode_reading", variant="fp8", ms=1.1, bytes_read=2000, **facts),
        record("decode_reading", variant="pages 0.05", ms=0.11, bytes_read=400, **facts),
    ]
    assert cache.reading_shortfalls(found) == [
        "A layer's step over 8 x 128K tokens, fp8: 1.10 of the time of 16 bits for 0.50 of the bytes."
    ]
