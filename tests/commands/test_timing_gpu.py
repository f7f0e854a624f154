"""Timing on a GPU: captured calls, numbers that are possible, and a generator that still works afterwards."""

from __future__ import annotations

import pytest
import torch

from sparsify import backends
from sparsify.commands.calibrate import timing
from sparsify.costs.samples import Workload

pytestmark = pytest.mark.gpu

PROMPT = {"query_len": 2048, "key_len": 2048}
CELLS = [
    Workload("attention", "sdpa", **PROMPT),
    Workload("attention", "triton", **PROMPT),
    Workload("attention", "triton", **PROMPT, density=0.3),
    Workload("select", **PROMPT, stride=16),
    Workload("decode", "sdpa", key_len=4096),
    Workload("decode", "cache", key_len=4096),
    Workload("ffn", rows=1, inputs=1024, outputs=4096, skipped=0.5),
    Workload("linear", rows=1, inputs=4096, outputs=4096),
    Workload("linear", rows=4096, inputs=4096, outputs=4096),
    Workload("elementwise", size=3 << 24),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.kind}-{cell.kernel}-{cell.rows}")
def test_times_are_possible(cell):
    sample = timing.measure(cell, "cuda")
    (work,) = sample.workload.works()
    assert sample.seconds < 0.1
    # no GPU of today does 5 PFLOP/s or reads 20 TB/s
    assert sample.seconds > float(work.flops) / 5e15
    assert sample.seconds > float(work.size) / 20e12
    torch.randn(8, device="cuda")


def test_a_hopper_kernel_is_timed_where_there_is_one():
    if backends.attention_family(torch.device("cuda"))[0] != "hopper":
        pytest.skip("no Hopper GPU")
    dense, sparse = (timing.measure(Workload("attention", "hopper", query_len=8192, key_len=8192, density=d), "cuda") for d in (None, 0.1))
    assert sparse.seconds < dense.seconds


def test_ceilings_are_possible():
    found = timing.ceilings("cuda")
    assert 1e12 < found["flops"] < 5e15
    assert 1e11 < found["bandwidth"] < 2e13
    assert 1e-7 < found["launch"] < 1e-3
