"""Selection and attention in one op by generated kernels, run by Triton's interpreter: parts change neither bits nor memory's bound."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import sparsify.backends
from sparsify.backends import dispatch
from sparsify.backends.select import triton as triton_select
from sparsify.backends.sparse_attention import sparse_attention
from sparsify.ops import scratch
from sparsify.ops.sparse_attention import SparseAttentionCall
from tests.support.memory import Memory

pytestmark = pytest.mark.interpreter

LENGTH, BLOCK, STRIDE = 1024, 64, 4


@pytest.fixture(autouse=True)
def kernels():
    before = dispatch._kernels
    sparsify.backends.use("triton")
    yield
    sparsify.backends.use(before)


@pytest.fixture
def uncounted_interpreter(monkeypatch):
    """The interpreter copies a launch's arguments; a GPU does not."""
    from triton.runtime.interpreter import GridExecutor

    launch_kernel = GridExecutor.__call__

    def call(*args, **options):
        with _disable_current_modes():
            return launch_kernel(*args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", call)


def operands(heads=4, kv_heads=2):
    torch.manual_seed(0)
    return 3 * torch.randn(1, heads, LENGTH, 16).bfloat16(), *(torch.randn(1, kv_heads, LENGTH, 16).bfloat16() for _ in range(2))


def call(tensors, **changes):
    base = {"scale": 0.25, "causal": True, "stride": STRIDE, "block_size": BLOCK, "threshold": [0.4], "seq_major": True}
    return SparseAttentionCall.bind(*tensors, **{**base, **changes})


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"estimate": "group+int8", "density": 0.3}, marks=pytest.mark.slow)], ids=["threshold", "group"]
)
def test_parts_give_the_same_bits_in_the_memory_foretold(monkeypatch, uncounted_interpreter, changes):
    each = scratch.list_bytes(LENGTH, LENGTH, BLOCK)
    one = call(operands(), **changes)
    whole = sparse_attention(one)
    sums = 1 << 14
    monkeypatch.setattr(scratch, "LIST_BYTES", 2 * each)
    monkeypatch.setattr(scratch, "SUM_BYTES", sums)
    monkeypatch.setattr(triton_select.select_blocks, "__kwdefaults__", {"tiling": None, "limits": triton_select.Limits(sums)})
    with Memory() as memory:
        found = sparse_attention(one, limit=scratch.LIST_BYTES)
    assert all(map(torch.equal, found, whole))
    foretold = scratch.scratch_bytes(1, 4, 2, LENGTH, LENGTH, 16, stride=STRIDE, block=BLOCK, estimate=one.estimate)
    taken = memory.most - sum(x.nbytes for x in found)
    assert 0.3 * foretold < taken < 1.05 * foretold + 4096
