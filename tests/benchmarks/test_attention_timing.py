"""A race of attention kernels: times, rates, differences from the reference's output, and who did not run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import run, timing
from sparsify.commands.bench.clock import Clock


def test_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CLOCK", Clock("cpu"))
    a = torch.eye(32)

    def absent() -> torch.Tensor:
        raise ImportError("no kernel")

    values = timing.race({"ours": lambda: a @ a + 0.25, "peer": lambda: a @ a, "absent": absent}, flops=1e9, reference="peer")
    assert values["ours_difference"] == 0.25 and "peer_difference" not in values
    assert values["absent_absent"] == "ImportError: no kernel" and "absent_ms" not in values
    assert values["ours_tflops"] == pytest.approx(1 / values["ours_ms"], rel=0.05, abs=1) and len(values["ours_rounds"]) == 1
    values = timing._with_ratio({"ours_ms": 2.0, "fa4_ms": 3.0, "cudnn_ms": 1.0}, ("fa4", "cudnn"))
    assert (values["ratio"], values["ratio_fa4"]) == (0.5, 1.5)


def test_every_section_has_cases() -> None:
    names = [name for section in run.SECTIONS for name in run.cases(section)]
    assert {"sparse_128k_.05", "dense_64k", "sink_window_128k", "dense_16k_dim_96", "dense_8k"} <= set(names)
