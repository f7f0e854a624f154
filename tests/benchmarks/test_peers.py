"""What sparsify is timed against computes the same: dense causal attention, and attention over listed blocks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.lib import models, peers


def operands(device: str, length: int = 512) -> tuple[torch.Tensor, ...]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    make = lambda heads: torch.randn(1, heads, length, 64, device=device, dtype=dtype)
    return make(4), make(2), make(2)


def test_on_a_cpu_there_is_sdpa() -> None:
    query, key, value = operands("cpu")
    (run,) = peers.dense(query, key, value).values()
    expected = functional.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True)
    torch.testing.assert_close(run(), expected)


def test_flex_attention_visits_the_listed_blocks() -> None:
    keep = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool).expand(1, 4, 4, 4)
    counts, indices, full_counts, full = peers._partial_and_full(keep)
    assert counts.unique().tolist() == [1] and indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert full_counts[0, 0].tolist() == [0, 1, 1, 1] and full[0, 0, 1:, 0].tolist() == [0, 1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["fa4", "cudnn", "fa2", "sparse fa4", "sparse flex"])
def test_every_peer_computes_attention(name: str) -> None:
    query, key, value = operands("cuda")
    keep = torch.ones(1, 4, 4, 4, dtype=torch.bool, device="cuda").tril()
    if name.startswith("sparse"):
        keep[:, :, 2:, 0] = False
        run = peers.block_sparse(query, key, value, keep)[name.removeprefix("sparse ")]
    else:
        run = peers.dense(query, key, value)[name]
    try:
        got = run()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    visible = keep.repeat_interleave(128, -1).repeat_interleave(128, -2).tril()
    repeated = (t.float().repeat_interleave(2, 1) for t in (key, value))
    expected = functional.scaled_dot_product_attention(query.float(), *repeated, attn_mask=visible)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


def test_the_8b_shape_is_said_once() -> None:
    assert (models.HEADS, models.KV_HEADS, models.HEAD_DIM) == (32, 8, 128)
