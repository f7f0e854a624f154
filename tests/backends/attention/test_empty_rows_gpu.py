"""The attention op on a GPU where rows see no key: every kernel family, against written-out attention there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends import dispatch
from tests.support.empty_rows_oracle import BIASED, CALLS, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LONG = {
    "hopper": {"query_len": 700, "key_len": 700, "heads": 8, "dim": 128, "dtype": torch.bfloat16},
    "long decode": {"query_len": 1, "key_len": 5000, "heads": 8, "dim": 128, "dtype": torch.bfloat16},
    "long, biased": {"query_len": 300, "key_len": 700, "dim": 64, "dtype": torch.float16, "bias": "added"},
}
EVERY = CALLS | BIASED | LONG


@pytest.mark.parametrize("form", ["mean", "nan", "zero"])
@pytest.mark.parametrize("name", EVERY)
def test_against_written_out_attention(name, form):
    call = make(form, **EVERY[name])
    if form == "zero":
        call.op = dataclasses.replace(call.op, hidden_bias=None)
    call = call.to("cuda")
    bound = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[call.op.query.dtype]
    with dispatch.strict():
        output, lse = call.op.run()
    want = call.written_out()
    if form == "zero":  # with a bias that hides, only rows of -inf are 0
        want = torch.where((lse > -1e30)[..., None], want, output.float())
        assert (output[lse == -torch.inf] == 0).all()
    torch.testing.assert_close(output.float(), want, atol=bound, rtol=0, equal_nan=True)


def test_a_cuda_graph_holds_it():
    call = make("mean", query_len=64, key_len=64, dim=64, dtype=torch.bfloat16).to("cuda")
    call.op.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = call.op.run()
    call.op.value.copy_(torch.randn_like(call.op.value))
    graph.replay()
    torch.testing.assert_close(output.float(), call.written_out(), atol=3e-2, rtol=0)
