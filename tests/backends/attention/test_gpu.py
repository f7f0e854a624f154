"""Generated attention kernels on a real GPU against the reference, with the tile sizes that calls get."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.attention import reference
from sparsify.backends.attention.triton import triton_attention
from sparsify.ops.attention import AttentionCall
from tests.support.attention_cases import CLAUSES, Case, make_call
from tests.support.attention_oracle import tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PREFILL = Case(
    batch=2, kv_heads=2, group=2, query_len=700, key_len=1100, qk_head_dim=128, v_head_dim=128, dtype=torch.bfloat16, block_size=128
)
WIDER = {"windows": (0, 64, 300, 900), "window": (200,)}


def check(case: Case):
    call = make_call(case).map_tensors(lambda tensor: tensor.cuda())
    output, lse = triton_attention(call)
    wanted, wanted_lse = reference.attention(call.in_dtype(torch.float64))
    bound = tolerance(case.dtype, call)
    torch.testing.assert_close(output.double(), wanted, atol=bound, rtol=bound)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("query_len", [1, 6, 700])
def test_every_clause(clause, query_len):
    chosen = dict(CLAUSES[clause])
    if len(chosen.get("windows", ())) == 4:
        chosen["windows"] = WIDER["windows"]
    elif chosen.get("windows"):
        chosen["windows"] = WIDER["window"]
    check(dataclasses.replace(PREFILL, query_len=query_len, **chosen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("query_len", [1, 300])
def test_dtypes_and_head_dims(dtype, dims, query_len):
    check(
        Case(
            kv_heads=2,
            group=4,
            query_len=query_len,
            key_len=577,
            dtype=dtype,
            qk_head_dim=dims[0],
            v_head_dim=dims[1],
            windows=(250,),
            sinks=4,
        )
    )


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("padding", ["", "left", "holes"])
def test_block_lists(block_size, padding):
    check(dataclasses.replace(PREFILL, block_size=block_size, padding=padding, lists=True))
    check(dataclasses.replace(PREFILL, block_size=block_size, padding=padding, lists=True, windows=(0, 64, 300, 900), sinks=4))


def test_offsets_beyond_32_bits():
    """Rows whose elements lie more than 2^31 apart, as in a fused projection of a very long prompt."""
    rows, stride = 40, 1 << 26
    wide = torch.zeros(rows * stride, dtype=torch.bfloat16, device="cuda")
    view = wide.as_strided((1, 1, rows, 64), (0, 0, stride, 1)).normal_()
    near = view.contiguous()
    calls = (AttentionCall(one, one, one, scale=0.125, causal=True) for one in (view, near))
    for got, wanted in zip(*map(triton_attention, calls), strict=True):
        torch.testing.assert_close(got, wanted)
