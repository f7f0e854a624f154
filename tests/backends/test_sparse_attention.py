"""Selection and attention in one op, on the CPU: whatever is served at once, the results are those of the two ops apart."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.sparse_attention import sparse_attention
from sparsify.ops import attention as ops
from sparsify.testing import record_blocks

LENGTH, BLOCK = 420, 64


def operands(batch=2, heads=6, kv_heads=2, query_len=LENGTH):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count, length: torch.randn(batch, count, length, 32, generator=generator)
    return 3 * draw(heads, query_len), draw(kv_heads, LENGTH), draw(kv_heads, LENGTH)


def call(**changes):
    base = {"scale": 0.2, "causal": True, "windows": [], "pool": "max", "stride": 8, "block_size": BLOCK}
    return {**base, "threshold": [0.4], "density": 0.0, "seq_major": False, "version": ops.VERSION, **changes}


def apart(query, key, value, seq_major, **options):
    counts, indices = ops.select_blocks(query, key, **options)
    common = {name: option for name, option in options.items() if name not in ("pool", "stride", "threshold", "density")}
    lists = {"block_counts": counts, "block_indices": indices}
    return *ops.attention(query, key, value, **lists, **common, sinks=0, softcap=0.0, seq_major=seq_major), counts


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
    "group": {"pool": "max+group", "density": 0.4},
    "8 bits": {"pool": "sum+half+int8"},
    "pairs": {"pool": "max+pair"},
    "start": {"query_start": torch.tensor(20)},
}


@pytest.mark.parametrize("limit", [10**9, 3000, 1000, 400, 1], ids=["whole", "rows", "KV heads", "heads", "one head"])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_same_bits(name, limit):
    inputs, options = operands(query_len=300 if name == "start" else LENGTH), call(**CASES[name])
    output, lse = sparse_attention(*inputs, limit=limit, **options)
    expected, expected_lse, counts = apart(*inputs, **options)
    assert counts.sum() < 0.9 * counts.numel() * 4, "some blocks are left out"
    assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    assert output.stride() == expected.stride()


def test_observers_see_all_heads_at_once():
    inputs = operands()
    with record_blocks() as whole:
        ops.sparse_attention(*inputs, **call())
    with record_blocks() as joined:
        sparse_attention(*inputs, limit=400, **call())
    assert len(whole) == len(joined) == 1
    assert torch.equal(whole[0].mask(), joined[0].mask()) and whole[0].density == joined[0].density


def test_fake_kernel_has_the_shapes_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = operands()
    for seq_major in (False, True):
        found = ops.sparse_attention(*inputs, **call(seq_major=seq_major))
        with FakeTensorMode() as mode:
            fake = ops.sparse_attention(*(mode.from_tensor(x) for x in inputs), **call(seq_major=seq_major))
        assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in found]
