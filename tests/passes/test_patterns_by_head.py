"""xattention whose heads choose differently: each head is what its own method alone would make of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from sparsify import api
from sparsify.backends.sparse_attention import sparse_attention
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.patterns import ALWAYS, SelectPatternCall
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall
from sparsify.passes.xattention import XAttention
from sparsify.planning.method import Context, Refusal
from sparsify.testing import record_blocks
from tests.support import attention_functions as attention
from tests.support.harness import strict
from tests.support.ir import rewritten_graph
from tests.support.patterns import BLOCK, chosen_blocks, masked

HEADS = 4
COLUMNS, DIAGONALS = (-1, 1, 0, -1), (-1, 0, 2, -1)  # the estimate, a vertical-slash, an A-shape, dense
THRESHOLDS = (0.3, 0.5, 0.4, 1.0)
ESTIMATE = {"pool": "row", "stride": 8, "block_size": BLOCK, "threshold": THRESHOLDS}


def operands(query_len: int, key_len: int, kv_heads: int = 2):
    draw = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, HEADS, query_len, 16, generator=draw)
    return query, *(torch.randn(2, kv_heads, key_len, 16, generator=draw) for _ in range(2))


def padding(key_len: int):
    return (torch.arange(key_len) >= torch.tensor([[0], [130]])).to(torch.uint8)


def make(call=SelectCall, tensors=None, **options):
    tensors = tensors or operands(500, 500)[: 2 if call is SelectCall else 3]
    found = call(
        *tensors, **{"scale": 0.25, "causal": True, **ESTIMATE, "columns": COLUMNS, "diagonals": DIAGONALS, "queries": 8, **options}
    )
    found.check()
    return found


def table(call) -> torch.Tensor:
    return block_lists.to_dense(*call.run(), call.key_blocks)


CASES = {
    "prompt": (500, 500, {}),
    "chunk": (200, 500, {}),
    "padding": (500, 500, {"key_flags": padding(500)}),
    "start": (200, 500, {"query_start": torch.tensor(100)}),
    "windows": (500, 500, {"windows": (0, 0, 0, 100)}),
    "density": (500, 500, {"pool": "max", "density": 0.4}),
    "group": (500, 500, {"estimate": dataclasses.replace(SelectCall.estimate, group=True)}),
}


@pytest.mark.parametrize("operand", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_head_lists_what_its_own_method_lists(name, operand):
    query_len, key_len, options = CASES[name]
    query, key, _ = operands(query_len, key_len)
    given = dict(options)
    if operand:
        numbers = {"head_columns": torch.tensor(COLUMNS), "head_diagonals": torch.tensor(DIAGONALS), "most": 2}
        given |= {**numbers, "columns": (), "diagonals": ()}
        if "density" not in options:
            given |= {"head_thresholds": torch.tensor(THRESHOLDS), "threshold": ()}
    one = make(tensors=(query, key), **given)
    found = table(one)
    estimated = table(make(tensors=(query, key), **options, columns=(), diagonals=()))
    shared = {name: options[name] for name in ("key_flags", "query_start") if name in options}
    numbers = {"columns": (0, 1, 0, 0), "diagonals": (0, 0, 2, 0), "queries": 8, "block_size": BLOCK}
    patterned = table(SelectPatternCall(query, key, scale=0.25, **shared, **numbers))
    for head, want in enumerate((estimated, patterned, patterned, estimated)):
        assert torch.equal(found[:, head], want[:, head])
    assert not torch.equal(found[:, 0], patterned[:, 0]) and not torch.equal(found[:, 1], estimated[:, 1])


def test_patterns_are_those_of_the_definition():
    query, key, _ = operands(500, 500)
    keep = chosen_blocks(query, key, [0, 1, 0, 0], [0, 0, 2, 0], 8)
    assert torch.equal(table(make(tensors=(query, key)))[:, [1, 2]], keep[:, [1, 2]])


@pytest.mark.parametrize("limit", [10**9, 1500, 1], ids=["whole", "heads", "one head"])
@pytest.mark.parametrize("columns", [COLUMNS, (0, 1, 2, 0), (-1, -1, -1, -1)])
def test_parts_give_the_same(limit, columns):
    """Parts of one kind of heads alone among them; what is observed is the whole."""
    diagonals = tuple(min(1, one) for one in columns)
    one = make(SparseAttentionCall, columns=columns, diagonals=diagonals, threshold=(0.3, 0.5, 0.4, 0.6))
    with record_blocks() as recorded:
        output, lse = sparse_attention(one, limit=limit)
    lists = one.selection().run()
    assert lists[1].shape[-1] == one.key_blocks and int(lists[0].min()) > 0
    want, want_lse = one.attention(*lists).run()
    torch.testing.assert_close(output, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(recorded[0].mask(), block_lists.to_dense(*lists, one.key_blocks)) and len(recorded) == 1
    torch.testing.assert_close(output, masked(*operands(500, 500), block_lists.to_dense(*lists, one.key_blocks)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"columns": (1, 2)}, "2 columns and 4 diagonals"),
        ({"columns": (1, 1, 1, -1), "diagonals": (1, -1, 1, -1)}, "-1 in both"),
        ({"causal": False}, "not causal"),
        ({"segments": torch.zeros(1, 500, dtype=torch.int32)}, "documents"),
        ({"stride": 16, "refine_stride": 8}, "two stages"),
        ({"head_columns": torch.zeros(HEADS, dtype=torch.int64)}, "head_diagonals"),
        ({"queries": 0}, "0 queries"),
    ],
)
def test_calls_that_make_no_sense(options, reason):
    with pytest.raises(UnsupportedError, match=reason):
        make(**options)


PATTERNS = [[], [64, 0], [0, 128], [], [192, 64], []]
CHOICE = {"block": BLOCK, "stride": 8, "estimate": [], "queries": 8}


def method(**more) -> dict:
    return {**CHOICE, "threshold": [0.3, 0.5, 0.4, 1.0], "patterns": PATTERNS[:HEADS], **more}


@pytest.mark.parametrize("together", [False, True])
def test_each_head_is_what_its_own_method_makes_of_it(together, monkeypatch):
    """Blocks by the estimate, columns, diagonals, a window, all in one layer; padded, and where one op makes and uses the lists."""
    if together:
        monkeypatch.setattr("sparsify.passes.xattention.lists_are_large", lambda site, block: True)
    query, key, value = attention.operands(query_len=400)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, :70] = 0
    inputs, outputs = (query, key, value, mask), []
    for name, options in (
        ("xattention", {**method(threshold=0.1), "windows": [0, 0, 0, 50], "sinks": 3}),
        ("xattention", {"block": BLOCK, "stride": 8, "estimate": [], "threshold": 0.1}),
        ("minference", {"columns": 64, "diagonals": 0, "queries": 8, "block": BLOCK}),
        ("minference", {"columns": 0, "diagonals": 128, "queries": 8, "block": BLOCK}),
        ("sink_window", {"window": 50, "sinks": 3}),
        ("dense", {}),
    ):
        torch._dynamo.reset()
        with torch.no_grad(), api.collect_plans() as plans:
            found = torch.compile(attention.padded, backend="sparsify", options=strict(passes=[name], **{name: options}))(*inputs)
        assert [d.method for plan in plans for d in plan.rewritten] == [name]
        outputs.append(found.transpose(1, 2)[mask.bool()])
    mixed, *alone, dense = outputs
    for head, own in enumerate(alone):
        torch.testing.assert_close(mixed[:, head], own[:, head], atol=1e-5, rtol=1e-5)
        assert (mixed - dense)[:, head].abs().max() > 1e-3
        assert all((mixed - other)[:, head].abs().max() > 1e-3 for other in alone if other is not own)


def test_keep_all_is_dense():
    inputs = attention.operands(query_len=400)
    heads = inputs[0].shape[1]
    given = XAttention(**method(threshold=0.2, patterns=[[64, 64]] + [[]] * (heads - 1)))
    outputs = []
    for one in (given, given.keep_all()):
        options = {key: value for key, value in one.options().items() if value != XAttention.model_fields[key].default}
        torch._dynamo.reset()
        compiled = torch.compile(attention.causal, backend="sparsify", options=strict(passes=["xattention"], xattention=options))
        with torch.no_grad(), api.collect_plans() as plans:
            outputs.append(compiled(*inputs))
        assert [d.method for plan in plans for d in plan.rewritten] == ["xattention"]
    dense = attention.causal(*inputs)
    torch.testing.assert_close(outputs[1], dense, atol=1e-5, rtol=1e-5)
    assert all((outputs[0] - dense)[:, head].abs().max() > 1e-2 for head in range(heads))


def test_what_it_refuses():
    heads = attention.operands(query_len=300)[0].shape[1]
    mixed = {"passes": ["xattention"], "xattention": {"block": BLOCK, "patterns": [[64, 64]] + [[]] * (heads - 1)}, "min_length": 0}
    _, after, plan = rewritten_graph(attention.full, attention.operands(query_len=300), mixed)
    assert after is None and "not causal" in plan.decisions[0].refusals[0]
    from tests.passes.test_xattention import CONTEXT, site

    divided = dataclasses.replace(CONTEXT, sequence="group", tokens=1 << 17, processes=2)
    assert isinstance(divided, Context)
    refused = XAttention(patterns=((64, 64),) * 32).propose(site(), divided)
    assert isinstance(refused, Refusal) and "divided among processes" in refused.reason
    # a process none of whose heads has a pattern takes them as operands all the same, and refuses what the others refuse
    own = XAttention(patterns=((64, 64),) * 32 + ((),) * 32, threshold=0.5).of_heads(Shard(1, 2, "group"), 32)
    assert not any(own.patterns) and own.head_numbers()["columns"] == (-1,) * 32 and isinstance(own.propose(site(), divided), Refusal)


@pytest.mark.parametrize(
    "bad",
    [
        {"patterns": ((1, 2, 3),)},
        {"patterns": ((1, -2),)},
        {"patterns": ((64, 64), ()), "density": 0.1},
        {"patterns": ((64, 64), ()), "refine_stride": 4},
        {"patterns": ((64, 64), ()), "windows": (20, 0)},
        {"patterns": ((64, 64), ()), "windows": (0, 20, 0)},
        {"patterns": ((64, 64), ()), "threshold": (0.5, 0.6, 0.7)},
    ],
)
def test_impossible_values(bad):
    with pytest.raises(ValidationError):
        XAttention(**bad)


def test_expected_times_and_kinds():
    """A head with a pattern costs what it visits, and layers whose patterns need about as much room are one kind."""
    one = XAttention(patterns=((256, 256), ()), threshold=(0.5, 0.6))
    both = float(one._expected(65536))
    alone = float(XAttention()._expected(65536))
    assert both == pytest.approx((alone + 2 * 128 * (4 + ALWAYS) / 65536) / 2)
    options = lambda patterns, **more: {"patterns": patterns, "threshold": [0.5, 0.6], **more}
    kind = lambda *args, **more: XAttention.kind(options(*args, **more))
    assert kind([[256, 256], []]) == kind([[], [384, 0]]) != kind([[256, 1024], []])
    assert kind([[256, 256], []]) != kind([[], []]) == kind([[], []], threshold=[0.1, 0.2])
    assert one.head_numbers() == {"threshold": (1.0, 0.6), "columns": (2, -1), "diagonals": (2, -1)}
