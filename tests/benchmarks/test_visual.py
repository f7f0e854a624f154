"""The benchmark of prompts with images, over a tiny model on a CPU."""

import json

import pytest

from benchmarks.model import report, visual


@pytest.mark.slow
def test_all_variants_run_and_hold_what_goes_on(tmp_path):
    out = tmp_path / "visual.jsonl"
    given = ["--shape", "tiny", "--images", "1", "--device", "cpu", "--lower", "eager", "--repeats", "1", "--out", str(out)]
    assert visual.main(given) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    # 64 tokens of text and 64 of an image; a quarter of those behind two of four layers, and behind none
    assert {r["variant"]: r["cached"] for r in found} == {"eager": 128, "dense": 128, "fastv": (2 * 128 + 2 * 80) / 4, "divprune": 80}
    text = report.visual_table(found)
    assert "64 image tokens of 128" in text and "| fastv, 25% of the image tokens |" in text
