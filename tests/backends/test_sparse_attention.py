"""Selection and attention in one op, on the CPU: whatever is served at once, the results are those of the two ops apart."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.attention import cpp
from sparsify.backends.sparse_attention import sparse_attention
from sparsify.ops.estimate import EXAMPLES
from sparsify.ops.sparse_attention import SparseAttentionCall
from sparsify.testing import record_blocks

LENGTH, BLOCK = 420, 64


def operands(batch=2, heads=6, kv_heads=2, query_len=LENGTH):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count, length: torch.randn(batch, count, length, 32, generator=generator)
    return 3 * draw(heads, query_len), draw(kv_heads, LENGTH), draw(kv_heads, LENGTH)


def call(tensors, **changes):
    return SparseAttentionCall.bind(*tensors, **{"scale": 0.2, "causal": True, "block_size": BLOCK, "threshold": [0.4], **changes})


def apart(call):
    counts, indices = call.selection().run()
    return *call.attention(counts, indices).run(), counts


def flags(rows=2):
    found = torch.ones(rows, LENGTH, dtype=torch.uint8)
    found[0, :130] = 0
    return found


SEGMENTS = (torch.arange(LENGTH) // 150).expand(2, -1).to(torch.int32)
CASES = {
    "causal": {},
    "seq_major": {"seq_major": True},
    "per head": {"threshold": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "windows": [0, 100, 0, 200, 0, 0]},
    "padding": {"key_flags": flags(), "windows": [150]},
    "one row of padding": {"key_flags": flags(1), "segments": SEGMENTS},
    **{str(one): {"estimate": one} for one in EXAMPLES},
    "start": {"query_start": torch.tensor(20)},
}


@pytest.mark.parametrize("limit", [10**9, 3000, 1000, 400, 1], ids=["whole", "rows", "KV heads", "heads", "one head"])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_same_bits(name, limit, monkeypatch):
    monkeypatch.setattr(cpp, "LEAST_SCORES", 0)  # parts would be small enough for the reference
    one = call(operands(query_len=300 if name == "start" else LENGTH), **CASES[name])
    output, lse = sparse_attention(one, limit=limit)
    expected, expected_lse, counts = apart(one)
    assert counts.sum() < 0.9 * counts.numel() * 4, "some blocks are left out"
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    assert output.stride() == expected.stride()


def test_observers_see_all_heads_at_once():
    inputs = operands()
    with record_blocks() as whole:
        call(inputs).run()
    with record_blocks() as joined:
        sparse_attention(call(inputs), limit=400)
    assert len(whole) == len(joined) == 1
    assert torch.equal(whole[0].mask(), joined[0].mask()) and whole[0].density == joined[0].density


def test_fake_kernel_has_the_shapes_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = operands()
    for seq_major in (False, True):
        found = call(inputs, seq_major=seq_major).run()
        with FakeTensorMode() as mode:
            fake = call([mode.from_tensor(x) for x in inputs], seq_major=seq_major).run()
        assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in found]
