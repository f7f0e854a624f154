"""Memory of selections as `sparsify.ops.scratch` foretells it, beside what a run makes: on the meta device, without launches."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends import sparse_attention
from sparsify.backends.select import prepare, stages, streamed, triton
from sparsify.ops import scratch
from sparsify.ops.estimate import parse_label
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall
from tests.support.memory import Memory
from tests.support.offline import SHARED_LIMIT

K = 1024


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    launched = []
    for module in (prepare, streamed, triton):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(triton, "_tiling", lambda device, int8: triton.tiling_for((9, 0), SHARED_LIMIT[90], int8))
    return launched


def operands(batch: int, heads: int, kv_heads: int, length: int, dim: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(batch, n, length, dim, dtype=torch.bfloat16, device="meta") for n in (heads, kv_heads, kv_heads))


def foretold(one, label: str) -> int:
    given = parse_label(label)
    sizes = one.batch, one.heads, one.kv_heads, one.query_len, one.key_len, one.query.shape[3]
    options = {name: given[name] for name in ("pool", "estimate", "refine_stride") if name in given}
    return scratch.scratch_bytes(*sizes, stride=one.stride, block=one.block_size, **options)


QUAD, PAIR = "row+quad+int8+peak", "row+pair+int8+peak"


@pytest.mark.parametrize(
    "label, stride, shape",
    [
        (QUAD + "/4@0.95", 8, (1, 32, 8, 8 * K, 128)),
        (QUAD + "/4@0.95", 8, (1, 32, 8, 128 * K, 128)),  # scores of some heads at a time in the second stage
        (QUAD + "/4@0.95", 8, (3, 8, 2, 96 * K + 1000, 128)),  # and of some batch rows in the first
        (QUAD + "/4@0.95", 8, (1, 8, 1, 1000 * K, 64)),  # and of some rows
        (PAIR + "/4@0.95", 8, (2, 12, 4, 20 * K, 80)),
        ("row+half+quad+int8/4@0.95", 16, (1, 32, 8, 64 * K, 128)),  # both stages make cells of their own
        ("row+pair/8@0.9", 16, (1, 32, 8, 64 * K, 128)),
        (PAIR, 4, (1, 32, 8, 128 * K, 128)),
        (QUAD, 8, (1, 32, 8, 256 * K, 128)),
        (PAIR + "/4@0.95", 8, (1, 2, 1, 1100 * K, 64)),  # rows too long for two stages
        ("row+int8", 8, (1, 32, 8, 32 * K, 128)),
        ("max+pair+int8", 8, (1, 32, 8, 32 * K, 128)),
        ("max", 16, (2, 8, 8, 32 * K, 64)),
    ],
)
def test_a_selection_takes_what_is_foretold(nothing_is_launched, label, stride, shape):
    batch, heads, kv_heads, length, _ = shape
    query, key, value = operands(*shape)
    one = SparseAttentionCall(query, key, value, scale=1.0, causal=True, stride=stride, threshold=(0.7,), **parse_label(label))
    each = scratch.list_bytes(length, length, 128)
    (part, *_) = scratch.parts(batch, heads, kv_heads, each, scratch.LIST_BYTES, not one.refine_stride)
    chosen: SelectCall = (one if part.heads == (0, heads) else one.part(part)).selection()
    with Memory() as memory:
        lists = stages.select_blocks(chosen.served)
    assert nothing_is_launched and lists[0].device.type == "meta"
    # of kernels that pass over the keys the largest tiles of any device are foretold, and importances of whole rows
    exact = "row" in label and length < 1 << 20
    assert (0.97 if exact else 0.75) < memory.most / foretold(one, label) <= 1.001


def test_a_second_stage_is_counted():
    """Its lists of groups and its logarithms, twice as many as the first's, which the prompt's heads then share out."""
    sizes, options = (1, 32, 8, 16 * K, 16 * K, 128), {"block": 128, "pool": "row", "estimate": parse_label(QUAD)["estimate"]}
    one, two = (scratch.scratch_bytes(*sizes, stride=8, refine_stride=refine, **options) for refine in (0, 4))
    places = 128 * 129 // 2
    assert two - one == 8 * scratch.list_bytes(16 * K, 16 * K, 128) + 32 * places * 16 * 2


def test_parts_of_a_whole_call_take_no_more(nothing_is_launched, monkeypatch):
    """Lists, attention and all: parts give back what they took before the next ones begin."""
    query, key, value = operands(1, 32, 8, 512 * K, 128)
    one = SparseAttentionCall(query, key, value, scale=1.0, causal=True, stride=8, threshold=(0.7,), **parse_label(QUAD + "/4@0.95"))
    monkeypatch.setattr(sparse_attention.registration, "select", lambda call: stages.select_blocks(call))
    monkeypatch.setattr(sparse_attention.registration, "attend", lambda call, into: into or call.empty_outputs())
    with Memory() as memory:
        outputs = sparse_attention.sparse_attention(one)
    needed = foretold(one, QUAD + "/4@0.95")
    assert len(list(scratch.parts(1, 32, 8, scratch.list_bytes(512 * K, 512 * K, 128), scratch.LIST_BYTES, False))) > 1
    assert 0.9 < (memory.most - sum(out.nbytes for out in outputs)) / needed <= 1.001
