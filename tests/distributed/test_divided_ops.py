"""Ops over a divided text give each process the rows that one process computes, whatever is read: dense, windows, chosen blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsify.backends import predict, registration
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.estimate import EXAMPLES, Estimate
from tests.support import divided, processes

HEADS = ((4, 2), (4, 4), (3, 1))
PADDING = ((0, 0), (0, 37))


def check(count: int, cases: list[dict], **how) -> list:
    found: list[list] = [[] for _ in range(count)]
    for first in range(0, len(cases), 12):  # each within the processes' patience
        for one, more in zip(found, processes.run(count, divided.parts, cases[first : first + 12], **how), strict=True):
            one += more
    for number, case in enumerate(cases):
        with divided.widest_row(case):
            output, lse = divided.call_of(case).run()
        seen = torch.zeros(case["tokens"], dtype=torch.int32)
        for spans, rows, sums, _ in (one[number] for one in found):
            at = 0
            for first, last in spans:
                part = slice(at, at + last - first)
                told = lambda text, case=case: f"{case}: {text}"
                torch.testing.assert_close(rows[:, :, part], output[:, :, first:last], atol=2e-5, rtol=1e-4, msg=told)
                torch.testing.assert_close(sums[:, :, part], lse[:, :, first:last], atol=2e-5, rtol=1e-4)
                seen[first:last] += 1
                at += last - first
        assert (seen == 1).all()
    return found


def attention(tokens: int, heads: tuple[int, int] = (4, 2), padding: tuple[int, ...] = (0, 0), **options) -> dict:
    return {"kind": "attention", "tokens": tokens, "heads": heads[0], "kv_heads": heads[1], "padding": padding, **options}


def sparse(tokens: int, heads: tuple[int, int] = (4, 2), padding: tuple[int, ...] = (0, 0), **options) -> dict:
    return attention(tokens, heads, padding, **{"stride": 8, "threshold": (0.6,), "pool": "row", **options}) | {"kind": "sparse"}


def pattern(tokens: int, heads: tuple[int, int] = (4, 2), padding: tuple[int, ...] = (0, 0), **options) -> dict:
    return attention(tokens, heads, padding, **{"columns": (2,), "diagonals": (1,), "queries": 20, **options}) | {"kind": "pattern"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_dense_and_windows(count):
    cases = []
    for tokens, heads, padding in itertools.product((1024, 700, 2049, 37), HEADS, PADDING):
        cases.append(attention(tokens, heads, padding))
        cases.append(attention(tokens, heads, padding, windows=(30,), sinks=3))
        cases.append(attention(tokens, heads, padding, windows=(0, 200, 20, 64)[: heads[0]], softcap=3.0))
    check(count, cases)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_chosen_blocks(count):
    cases = [sparse(tokens, heads, padding) for tokens, heads, padding in itertools.product((1024, 1537, 3001), HEADS, PADDING)]
    for estimate, pool in itertools.product(EXAMPLES, ("row", "max", "sum")):
        cases.append(sparse(1537, pool=pool, estimate=estimate, padding=PADDING[len(cases) % 2], threshold=(0.8,)))
    cases += [
        sparse(1025, block_size=64),
        sparse(2049, pool="max", density=0.3, threshold=()),
        sparse(2049, stride=16, refine_stride=4),
        sparse(2049, threshold=(0.3, 1.0, 0.6, 0.9), windows=(0, 40, 0, 0), sinks=2, padding=(0, 90)),
    ]
    check(count, cases)


@pytest.mark.slow
def test_a_text_that_no_first_stage_serves_has_one_for_no_row():
    """Of a text of 17 blocks, rows that see fewer than the widest row's too: a call over all of it has one stage for all rows."""
    two = {"stride": 16, "refine_stride": 4, "coarse_threshold": 0.5, "threshold": (0.3,)}
    cases = [sparse(2049, widest=16, estimate=Estimate.parse(name), **two) for name in ("exact", "quad+int8+peak", "half+pair")]
    check(2, cases)
    for case in cases:
        alone = divided.call_of(case)
        with divided.widest_row(case):
            one = alone.run()[0]
        assert (one - alone.run()[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_columns_and_diagonals(count):
    """The rows that choose are of one chunk, of two, or in a padded row anybody's; numbers by head, and blocks of either size."""
    cases = [pattern(tokens, heads, padding) for tokens, heads, padding in itertools.product((1024, 1537, 3001), HEADS, PADDING)]
    cases += [
        pattern(1025),  # one row in the last chunk, the others in the one before
        pattern(1100, queries=700, padding=(0, 900)),
        pattern(1537, block_size=64, columns=(0,), diagonals=(4,)),
        pattern(2049, columns=(0, 1, 2, 3), diagonals=(3, 0, 1, 0), padding=(0, 90)),
        pattern(2049, columns=(1 << 14,), diagonals=(0,)),  # everything
        pattern(2049, columns=(), diagonals=(), most=6, **dict.fromkeys(("head_columns", "head_diagonals"), torch.tensor([0, 1, 3, 2]))),
    ]
    check(count, cases)


@pytest.mark.slow
def test_columns_and_diagonals_of_some_heads_after_the_others():
    case = pattern(2049, heads=(8, 4), columns=(1, 2, 1, 0, 3, 1, 2, 2))
    at_once, *others = (check(2, [case], **how)[0][0][3] for how in ({"least": 1 << 20}, {"limit": 1}, {"least": 8}, {"travels": "keys"}))
    assert all(sent == at_once for sent in others)  # as many bytes
    (_, _, _, queries), _ = (found[0] for found in check(2, [case], travels="queries"))
    assert "keys and values" not in queries and queries["queries and what they found"]


@pytest.mark.slow
def test_bytes_of_columns_and_diagonals():
    """Of 2048 tokens in 16 blocks, no columns but the first block and no diagonals but two: the others' neighbours of a chunk's ends."""
    each = 2 * 2 * 16 * 4  # a token's keys, or values: two rows, two heads
    found = check(2, [pattern(2048, columns=(0,), diagonals=(0,), queries=16)])
    sent = [one[0][3] for one in found]
    heads = 2 * 4  # two rows of the batch
    for one in sent:
        assert one["queries that choose"] == heads * 16 * 16 * 4
        assert one["what they look at"] == heads * 16 * 4 + 2 * heads * 16 * 4
    # rank 0 has the first block and the one before the other's chunks; the one before its own second chunk comes to it
    assert [one["keys and values"] for one in sent] == [2 * 128 * each * 2, 1 * 128 * each * 2]


@pytest.mark.slow
def test_some_heads_after_the_others():
    case = sparse(2049, heads=(8, 4))
    at_once, *others = (check(2, [case], **how)[0][0][3] for how in ({"least": 1 << 20}, {"limit": 1}, {"least": 8}, {"least": 1}))
    assert all(sent == at_once for sent in others)  # as many bytes


@pytest.mark.slow
def test_bytes_of_what_is_read():
    """Of each method on a text of 2048 tokens, two heads of 16 numbers in fp32."""
    each = 2 * 2 * 16 * 4  # a token's keys, or values: two rows, two heads
    sent = [found[3] for found in check(2, [attention(2048), attention(2048, windows=(100,), sinks=4)])[0]]
    assert sent[0] == {"keys and values": 2 * 1024 * each}
    # rank 0 has the sinks and the block before the other's first chunk; the one before its own second chunk comes to it
    assert sent[1] == {"keys and values": 2 * 128 * each * 2}
    cells = lambda name: check(2, [sparse(2048, estimate=Estimate.parse(name), pool="max")])[0][0][3]["the estimate's cells"]
    # 8 bits and a scale for each block under peak, for each cell of 8 tokens without; and the sum of the keys
    eight, mean = each // 4, 2 * 2 * 16 * 4
    scales = lambda tokens: 1024 // tokens * 2 * 2 * 4
    assert cells("exact") == 1024 * each and cells("quad") == 256 * each
    assert cells("pair+int8+peak") == 512 * eight + scales(128) + mean
    assert cells("int8") == 1024 * eight + scales(8) + mean


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_queries_that_travel_find_what_keys_that_travel_bring(count):
    cases = [sparse(tokens, heads, padding) for tokens, heads, padding in itertools.product((1024, 1537), ((4, 2), (4, 4)), PADDING)]
    cases += [sparse(2049, block_size=64, heads=(4, 4)), sparse(1025, threshold=(0.3, 1.0, 0.6, 0.9), heads=(4, 4))]
    by_keys, by_queries = check(count, cases, travels="keys"), check(count, cases, travels="queries")
    for keys, queries in zip(by_keys, by_queries, strict=True):
        for (_, one, sums, sent), (_, other, other_sums, other_sent) in zip(keys, queries, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(sums, other_sums, atol=2e-5, rtol=1e-4)
            assert "queries and what they found" not in sent and "keys and values" not in other_sent
    assert all(any("queries and what they found" in queries[at][3] for queries in by_queries) for at in range(len(cases)))


@pytest.mark.slow
def test_what_travels_is_what_takes_fewer_bytes():
    """With a KV head for each query head, blocks that all are visited are as many bytes as the queries; with few heads for many, fewer."""
    sent = lambda case: {name for one in check(2, [case]) for name in one[0][3]}
    assert "queries and what they found" not in sent(sparse(2048, heads=(4, 1), threshold=(1.0,)))
    assert "queries and what they found" not in sent(sparse(2048, heads=(4, 4), threshold=(0.1,)))


@pytest.mark.parametrize(
    "options, what",
    [
        ({"causal": False}, "attention that is not causal"),
        ({"segments": torch.zeros(1, 64, dtype=torch.int32)}, "packed documents"),
        ({"bias": torch.zeros(1, 1, 64, 64)}, "a bias, or ALiBi"),
        ({"empty_rows": "nan"}, "rows without a key"),
    ],
)
def test_what_is_not_served_says_so(options, what):
    call = divided.replaced(divided.call_of(attention(64, padding=(0,))), **{"sequence": "group", **options})
    with pytest.raises(UnsupportedError, match=f"{what}.* divided among processes"):
        call.run()


def test_columns_and_diagonals_of_a_chunk_are_not_divided():
    call = divided.replaced(divided.call_of(pattern(64, padding=(0,))), sequence="group", query_start=torch.tensor(0))
    with pytest.raises(UnsupportedError, match=r"queries that begin elsewhere.* divided among processes"):
        call.run()


def test_kernels_of_a_divided_call_are_foreseen_without_an_exchange(monkeypatch):
    ran = []
    monkeypatch.setitem(registration.SERVED, "attention", lambda *args, **options: ran.append(options))
    predict.launches("attention", [], {"sequence": "group", "scale": 1.0}, torch.device("cpu"))
    assert ran == [{"scale": 1.0}]


@pytest.mark.slow
def test_the_density_of_a_divided_prompt_is_that_of_all_its_rows():
    """One number for a call, in which a chunk counts by the blocks that it could visit: 2 of 21 for the first, 19 for the last."""
    cases = [sparse(2048, density=0.3, pool="max", threshold=()), sparse(1537), sparse(2049, heads=(4, 4), threshold=(0.2, 1.0, 0.6, 0.4))]
    cases.append(pattern(2049, columns=(1,), diagonals=(1,)))
    found = processes.run(2, divided.densities, cases)
    for number, case in enumerate(cases):
        call = divided.call_of(case)
        counts, _ = call.selection().run()
        listed = counts.sum((0, 1))  # by query block
        possible = block_lists.causal_blocks(call.query_len, call.key_len, 0, call.block_size) * counts[..., 0].numel()
        means = []
        for (collected,), spans in (one[number] for one in found):
            rows = torch.cat([torch.arange(first // 128, -(-last // 128)) for first, last in spans])
            assert collected == pytest.approx(float(listed[rows].sum() / possible[rows].sum()))
            means.append(collected)
        assert min(means) > 0 and (number or max(means) < 0.5)
