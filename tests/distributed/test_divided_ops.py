"""Ops over a divided text give each process the rows that one process computes, whatever is read: dense, windows, chosen blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsify.backends import predict, registration
from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import EXAMPLES, Estimate
from tests.support import divided, processes

HEADS = ((4, 2), (4, 4), (3, 1))
PADDING = ((0, 0), (0, 37))


def check(count: int, cases: list[dict], limit: int | None = None) -> list:
    found = processes.run(count, divided.parts, cases, limit)
    for number, case in enumerate(cases):
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
def test_some_heads_after_the_others():
    case = sparse(2049, heads=(8, 4))
    assert check(2, [case], 1)[0][0][3] == check(2, [case])[0][0][3]  # as many bytes


@pytest.mark.slow
def test_bytes_of_what_is_read():
    """Of each method on a text of 2048 tokens, two heads of 16 numbers in fp32."""
    each = 2 * 2 * 16 * 4  # a token's keys, or values: two rows, two heads
    sent = [found[3] for found in check(2, [attention(2048), attention(2048, windows=(100,), sinks=4)])[0]]
    assert sent[0] == {"keys and values": 2 * 1024 * each}
    # rank 0 has the sinks and the block before the other's first chunk; the one before its own second chunk comes to it
    assert sent[1] == {"keys and values": 2 * 128 * each * 2}
    cells = lambda name: check(2, [sparse(2048, estimate=Estimate.parse(name), pool="max")])[0][0][3]["the estimate's cells"]
    assert [cells(name) for name in ("exact", "pair+int8+peak", "quad")] == [1024 * each, 512 * each, 256 * each]


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


def test_kernels_of_a_divided_call_are_foreseen_without_an_exchange(monkeypatch):
    ran = []
    monkeypatch.setitem(registration.SERVED, "attention", lambda *args, **options: ran.append(options))
    predict.launches("attention", [], {"sequence": "group", "scale": 1.0}, torch.device("cpu"))
    assert ran == [{"scale": 1.0}]
