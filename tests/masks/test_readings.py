"""Calls are read as torch makes them: each form of a call, and each dtype, gives eager's result, and what is odd costs its own site alone.

A table of masks is one graph with one attention for every mask.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from sparsify.backends import dispatch
from sparsify.backends.attention import reference
from sparsify.masks import reader
from tests.support.harness import strict

LENGTH = 12
LOWEST = torch.finfo(torch.float32).min
Table = dict[str, tuple[Callable, str]]


def attend(masks, query, key, value, *extra):
    q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    return [F.scaled_dot_product_attention(query, key, value, attn_mask=make(q, k, *extra), scale=0.4) for make in masks]


@torch.no_grad()
def outcomes(masks: list[Callable], *extra, query_len: int = LENGTH, key_len: int = LENGTH, batch: int = 2, dynamic=None) -> list[tuple]:
    """What became of each mask's attention: its mask in words, and the error of its output where eager has a number.

    Nothing is validated by running it: what is read must be right by itself.
    """
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(batch, 2, length, 8, generator=generator) for length in (query_len, key_len, key_len)]
    function = functools.partial(attend, masks)
    torch._dynamo.reset()
    with warnings.catch_warnings(), api.collect_plans() as plans:
        warnings.simplefilter("ignore")
        want = function(*operands, *extra)
        options = strict(exact=True, validation=False)
        compiled = torch.compile(function, backend="sparsify", options=options, dynamic=dynamic, fullgraph=True)
        got = compiled(*operands, *extra)
    (plan,) = plans
    assert len(plan.decisions) == len(masks)
    assert all((d.method is None) == d.mask.startswith("opaque") for d in plan.decisions)
    errors = [(x - y)[y.isfinite()].abs().max().item() for x, y in zip(got, want, strict=True)]
    return list(zip((d.mask for d in plan.decisions), errors, strict=True))


def check(table: Table, *extra, **sizes) -> None:
    found = dict(zip(table, outcomes([make for make, _ in table.values()], *extra, **sizes), strict=True))
    wrong = {name: (words, error) for name, (words, error) in found.items() if not error < 1e-5}
    assert not wrong
    unexpected = {name: found[name][0] for name, (_, words) in table.items() if not found[name][0].startswith(words)}
    assert not unexpected


# -- how arguments are bound ---------------------------------------------------------------------------------------------------------------

ones = torch.ones
SUMS: Table = {
    "input and other by name": (lambda q, k: k <= torch.add(input=q, other=2), "causal from 2"),
    "NumPy's names": (lambda q, k: k <= torch.add(x=q, x2=2), "causal from 2"),
    "alpha": (lambda q, k: k <= torch.add(q, torch.ones_like(q), alpha=2), "causal from 2"),
    "alpha of a method": (lambda q, k: k <= q.add(torch.ones_like(q), alpha=2), "causal from 2"),
    "alpha first": (lambda q, k: k <= q.add(3, torch.ones_like(q) * 2), "causal from 6"),
    "alpha first, of a function": (lambda q, k: k <= torch.add(q, 3, torch.ones_like(q) * 2), "causal from 6"),
    "alpha first, subtracted": (lambda q, k: k <= torch.sub(q, -3, torch.ones_like(q) * 2), "causal from 6"),
    "alpha subtracted": (lambda q, k: k <= q.sub(torch.ones_like(q), alpha=-2), "causal from 2"),
    "reversed": (lambda q, k: k <= -torch.rsub(q, 2), "causal from -2"),
    "reversed with alpha": (lambda q, k: k <= torch.rsub(-q, other=0, alpha=1), "causal"),
    "reversed with another alpha": (lambda q, k: k * 2 <= torch.rsub(-q, 0, alpha=2), "opaque"),
    "alpha of zero": (lambda q, k: k <= q.add(torch.ones_like(q), alpha=0), "causal"),
}
RANGES: Table = {
    "end": (lambda q, k: torch.arange(end=12)[None] <= q, "causal"),
    "start and end": (lambda q, k: k <= torch.arange(2, 14)[:, None], "causal from 2"),
    "end by name": (lambda q, k: k <= torch.arange(2, end=14)[:, None], "causal from 2"),
    "both by name": (lambda q, k: k <= torch.arange(end=14, start=2)[:, None], "causal from 2"),
    "step": (lambda q, k: torch.arange(0, 24, 2)[None] <= torch.arange(0, 24, step=2)[:, None], "opaque"),
    "step of one": (lambda q, k: k <= torch.arange(2, 14, step=1)[:, None], "causal from 2"),
    "backwards": (lambda q, k: torch.arange(11, -1, -1)[:, None] <= torch.arange(11, end=-1, step=-1)[None], "causal"),
    "negative start": (lambda q, k: k <= torch.arange(start=-1, end=11, device="cpu")[:, None], "causal from -1"),
}
interleave, CHUNKS = torch.repeat_interleave, "causal, documents"
VIEWS: Table = {
    "unsqueeze": (lambda q, k: torch.arange(12).unsqueeze(dim=0) <= torch.unsqueeze(torch.arange(12), dim=-1), "causal"),
    "transpose": (lambda q, k: k <= torch.transpose(k, dim0=0, dim1=1), "causal"),
    "transpose, mixed": (lambda q, k: k <= k.transpose(0, dim1=-1), "causal"),
    "swapaxes": (lambda q, k: k <= k.swapaxes(axis0=0, axis1=1), "causal"),
    "swapdims": (lambda q, k: k <= torch.swapdims(k, 1, 0), "causal"),
    "permute": (lambda q, k: k <= k.permute(dims=(1, 0)), "causal"),
    "permute by a function": (lambda q, k: k <= torch.permute(input=k, dims=(1, 0)), "causal"),
    "permute, spread": (lambda q, k: k <= k.permute(1, 0), "causal"),
    "view": (lambda q, k: k <= k.view(12, 1), "causal"),
    "view by name": (lambda q, k: k <= k.view(size=(12, 1)), "causal"),
    "view as its own dtype": (lambda q, k: k <= q.view(torch.int64), "causal"),
    "view as another dtype": (lambda q, k: (k <= q).float().view(torch.int32) > 1065353216 - 1, "opaque"),
    "view as another dtype, by name": (lambda q, k: (k + 0.5).float().view(dtype=torch.int32) - q >= 0, "opaque"),
    "reshape": (lambda q, k: k <= torch.reshape(input=k, shape=(12, 1)), "causal"),
    "flatten": (lambda q, k: k <= q.flatten(start_dim=0)[:, None], "causal"),
    "squeeze": (lambda q, k: k <= q.squeeze(dim=1)[:, None], "causal"),
    "select": (lambda q, k: k <= (q + k * 0).select(dim=1, index=0)[:, None], "causal"),
    "narrow": (lambda q, k: k <= torch.arange(14).narrow(dim=0, start=2, length=12)[:, None], "causal from 2"),
    "expand": (lambda q, k: k <= q.expand(size=(12, 12)), "causal"),
    "broadcast": (lambda q, k: torch.broadcast_to(input=k <= q, size=(1, 12, 12)), "causal"),
    "repeat": (lambda q, k: k.repeat(1, 1, 12, 1) <= q.repeat(repeats=(1, 12)), "causal"),
    "repeat, spread": (lambda q, k: (k <= q).repeat(1, 1, 1), "causal"),
    "tile": (lambda q, k: torch.tile(k <= q, dims=(1, 1, 1, 1)), "causal"),
    "repeat that tiles": (lambda q, k: k <= torch.arange(6).repeat(2)[:, None], "opaque"),
    "interleaved": (
        lambda q, k: (k <= q) & (interleave(torch.arange(3), 4)[None] == torch.arange(3).repeat_interleave(4)[:, None]),
        CHUNKS,
    ),
    "interleaved, by name": (lambda q, k: (k <= q) & (interleave(input=torch.arange(4), repeats=3, dim=0)[None] > 1), "causal, padding"),
    "interleaved once": (lambda q, k: k <= q.repeat_interleave(1, dim=0), "causal"),
    "interleaved columns": (lambda q, k: (k <= q) & (torch.arange(6)[None] > 1).repeat_interleave(2, dim=-1), "causal, padding"),
    "interleaved rows alone": (lambda q, k: (k <= q) & (k // 4 == torch.arange(3)[:, None].repeat_interleave(4, dim=0)), CHUNKS),
    "interleaved otherwise": (lambda q, k: (k <= q) & (k // 4 == torch.arange(4)[:, None].repeat_interleave(3, dim=0)), "opaque"),
    "interleaved, merged": (lambda q, k: k <= q.repeat_interleave(1)[:, None], "opaque"),
    "interleaved by a tensor": (
        lambda q, k: k <= torch.arange(2).repeat_interleave(torch.tensor([5, 7]), output_size=12)[:, None],
        "opaque",
    ),
}
MASKS: Table = {
    "tril": (lambda q, k: torch.tril(input=ones(12, 12, dtype=torch.bool)), "causal"),
    "tril with a diagonal": (lambda q, k: torch.tril(diagonal=1, input=ones(12, 12, dtype=torch.bool)), "causal from 1"),
    "triu of a method": (lambda q, k: ones(size=(12, 12)).triu(diagonal=1) == 0, "causal"),
    "where": (lambda q, k: torch.where(condition=k <= q, input=torch.tensor(0.0), other=LOWEST), "causal"),
    "where, mixed": (lambda q, k: torch.where(k <= q, other=torch.tensor(LOWEST), input=torch.tensor(0.0)), "causal"),
    "where of a method": (lambda q, k: torch.zeros(12, 12).where(k <= q, LOWEST), "causal"),
    "where of a method, by name": (lambda q, k: torch.zeros(12, 12).where(condition=k <= q, other=torch.tensor(LOWEST)), "causal"),
    "masked_fill": (lambda q, k: torch.masked_fill(input=torch.zeros(12, 12), mask=k > q, value=LOWEST), "causal"),
    "masked_fill of a method": (lambda q, k: torch.zeros(12, 12).masked_fill(value=LOWEST, mask=k > q), "causal"),
    "full": (lambda q, k: torch.full(fill_value=LOWEST, size=(12, 12)).triu(1), "causal"),
    "new_full": (lambda q, k: torch.zeros(2).new_full(fill_value=LOWEST, size=(12, 12)).triu(1), "causal"),
    "full_like": (lambda q, k: torch.full_like(fill_value=LOWEST, input=ones(12, 12)).triu(1), "causal"),
    "new_ones": (lambda q, k: q.new_ones(12, 12, dtype=torch.bool).tril(), "causal"),
    "comparison by name": (lambda q, k: torch.le(input=k, other=q), "causal"),
    "logical_and": (lambda q, k: torch.logical_and(input=k <= q, other=k > q - 3), "causal, window 3"),
    "cumsum": (lambda q, k: k < torch.cumsum(input=torch.ones_like(q), dim=1) + q, "causal"),
    "cumsum, NumPy's name": (lambda q, k: torch.ones_like(k).cumsum(axis=-1) <= q + 1, "causal"),
    "to": (lambda q, k: ones(12, 12).tril().to(dtype=torch.bool, device="cpu", copy=True), "causal"),
    "to, by position": (lambda q, k: ones(12, 12).tril().to("cpu", torch.bool, False), "causal"),
    "to as another": (lambda q, k: ones(12, 12).tril().to(k <= q), "causal"),
    "type": (lambda q, k: ones(12, 12).tril().type(dtype=torch.bool), "causal"),
    "type_as": (lambda q, k: ones(12, 12).tril().type_as(other=k <= q), "causal"),
    "float": (lambda q, k: (k > q).float(memory_format=torch.contiguous_format) * LOWEST, "causal"),
    "diff with append": (lambda q, k: torch.diff(k + 0 * q, append=k[:, :1] + q * 0, dim=-1) > 0, "opaque"),
    "result put elsewhere": (lambda q, k: torch.le(k, q, out=torch.empty(12, 12, dtype=torch.bool)), "opaque"),
}


@pytest.mark.parametrize("table", ["SUMS", "RANGES", "VIEWS", "MASKS"])
def test_forms_of_a_call(table):
    check(globals()[table], batch=1)


def test_a_chunk_whose_range_starts_by_position():
    places = lambda q, k: torch.arange(4, end=k.shape[1])[:, None]
    check({"chunk": (lambda q, k: k <= places(q, k), "causal")}, query_len=6, key_len=10)


def test_packed_positions_in_other_forms():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    causal = lambda p: p[:, None, None, :] <= p[:, None, :, None]
    same = lambda runs: runs[:, None, :, None] == runs[:, None, None, :]
    by_name = lambda p: torch.diff(input=p, prepend=p[:, :1] - 1, n=1).ne(other=1).cumsum(dim=1)
    by_place = lambda p: torch.ne(torch.diff(p, 1, -1, p[:, :1] - 1), 1).cumsum(-1)
    second = lambda p: (torch.diff(p, 2, -1, p[:, :1].expand(-1, 2) - 1) != 1).cumsum(-1)
    narrow = lambda p: (torch.diff(p.int(), prepend=p[:, :1].int() - 1) != 1).cumsum(-1)
    table = {
        "by name": (lambda q, k, p: same(by_name(p)) & causal(p), "causal, documents"),
        "by position": (lambda q, k, p: same(by_place(p)) & causal(p), "causal, documents"),
        "second differences": (lambda q, k, p: same(second(p)) & causal(p), "opaque"),
        "differences that may overflow": (lambda q, k, p: same(narrow(p)) & causal(p), "opaque"),
    }
    check(table, positions, batch=1)


def test_every_declared_argument_reaches_its_reading():
    with pytest.raises(TypeError, match="ignores"):
        reader.handles("nothing of torch", signature="input, other, _dtype=None")(lambda reader, node, input: None)


@pytest.mark.parametrize("error", [IndexError, TypeError, KeyError, ZeroDivisionError, RecursionError, AttributeError])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_in_a_reading_costs_its_own_site(error, late, monkeypatch):
    def broken(reader, node, **arguments):
        def at(*indices):
            raise error("unforeseen")

        return at if late else at()

    real = reader._READINGS["tril"]
    monkeypatch.setitem(reader._READINGS, "tril", dataclasses.replace(real, handler=broken))
    first, second = outcomes([lambda q, k: torch.ones(12, 12, dtype=torch.bool).tril(), lambda q, k: k <= q])
    assert "not foreseen" in first[0] and error.__name__ in first[0] and second[0] == "causal"
    assert max(first[1], second[1]) < 1e-5


def test_readings_take_no_argument_by_its_place():
    from sparsify.masks import readings

    assert "node.args" not in inspect.getsource(readings) and "node.kwargs" not in inspect.getsource(readings)


# -- numbers -------------------------------------------------------------------------------------------------------------------------------

INT, LONG = torch.int32, torch.int64
TRUNCATED: Table = {
    "range and constant": (lambda q, k: k <= torch.arange(0.5, 12.5, dtype=LONG)[:, None] + torch.tensor(1.5, dtype=LONG), "opaque"),
    "start": (lambda q, k: k <= torch.arange(1.5, 13.5, dtype=LONG)[:, None], "opaque"),
    "step": (lambda q, k: k <= torch.arange(0, 18, 1.5, dtype=INT)[:, None], "opaque"),
    "constant": (lambda q, k: k <= q + torch.tensor(1.9, dtype=LONG), "causal from 1"),
    "negative constant": (lambda q, k: k <= q + torch.tensor(-1.9, dtype=LONG), "causal from -1"),
    "scalar_tensor": (lambda q, k: k <= q + torch.scalar_tensor(1.5, dtype=INT), "causal from 1"),
    "full": (lambda q, k: k <= q + torch.full((12, 1), 1.5, dtype=LONG), "causal from 1"),
    "new_full": (lambda q, k: k <= q + q.new_full((12, 1), 1.5), "causal from 1"),
    "full_like": (lambda q, k: k <= q + torch.full_like(q, -1.5), "causal from -1"),
    "masked_fill": (lambda q, k: k <= q + torch.zeros_like(q).masked_fill(q >= 0, 1.5), "causal from 1"),
    "a float becomes whole": (lambda q, k: k <= q + torch.tensor(1.9).long(), "causal from 1"),
    "positions become whole": (lambda q, k: k <= (q * 0.5).long(), "opaque"),
    "a condition": (lambda q, k: k <= q + torch.full((), 0.5, dtype=torch.bool), "causal from 1"),
    "a fraction": (lambda q, k: k < q + 0.5, "opaque"),
    "a fraction in a constant": (lambda q, k: (k <= q) & (k < 2.5), "causal, padding"),
}
OVERFLOW: Table = {
    "near the limit": (lambda q, k: k <= q + (2**63 - 3), "opaque"),
    "past the limit in two steps": (lambda q, k: k <= (q + 2**62) + 2**62, "opaque"),
    "there and back": (lambda q, k: k <= (q + (2**62)) - 2**62, "causal"),
    "a product": (lambda q, k: k <= q * 2**60, "opaque"),
    "far below": (lambda q, k: k >= q - (2**63 - 1), "opaque"),
    "narrower": (lambda q, k: k.int() <= q.int() + 2**31 - 4, "opaque"),
    "narrower, a product": (lambda q, k: k.int() <= q.int() * 2**29, "opaque"),
    "narrower, far from it": (lambda q, k: k.int() <= q.int() + 2, "causal from 2"),
    "a wider constant is cut": (lambda q, k: k.int() <= q.int() + torch.tensor(2**32 + 1), "opaque"),
    "a wider constant is cut by a comparison": (lambda q, k: k.int() - q.int() <= torch.tensor(2**32), "opaque"),
    "a number is cut by a comparison": (lambda q, k: k.int() - q.int() <= 2**32, "opaque"),
    "a conversion": (lambda q, k: k <= q + torch.tensor(2**32 + 1).int(), "causal from int"),
    "sums": (lambda q, k: k <= q + torch.full_like(q, 2**60).cumsum(0), "opaque"),
    "sums of a narrow type": (lambda q, k: (torch.ones_like(q) * 100).cumsum(0, dtype=torch.int8) >= k, "opaque"),
    "the smallest has no absolute value": (lambda q, k: torch.full_like(q, -(2**63)).abs() > k, "opaque"),
    "8 bits": (lambda q, k: k <= (q + 250).to(torch.uint8), "opaque"),
    "complement": (lambda q, k: k <= ~(-q - 1), "opaque"),
    "quotient": (lambda q, k: k <= (q - 3) // 2, "opaque"),
    "true quotient": (lambda q, k: k <= q / 2, "opaque"),
    "remainder": (lambda q, k: k <= -q % 5, "opaque"),
}
FLOATS: Table = {
    "whole constant": (lambda q, k: (k <= q) & (k - q > -3.0), "causal, window 3"),
    "constants that a comparison rounds": (lambda q, k: torch.where(k <= q, 0.1, 0.0) == 0.1, "causal"),
    "constants that differ": (lambda q, k: torch.where(k <= q, 0.1, 0.0).double() == 0.1, "opaque"),
    "halves of constants": (lambda q, k: torch.where(k <= q, 0.1, 0.0).half() == 0.1, "opaque"),
    "positions": (lambda q, k: k.float() <= q.float(), "opaque"),
    "positions beyond 2 ** 24": (lambda q, k: (k + 2**24).float() - 2**24 <= q, "opaque"),
    "a constant beyond 2 ** 24": (lambda q, k: k - q + 2**24 <= 16777216.0, "opaque"),
    "underflow": (lambda q, k: ((k - q) * 1e-30 * 1e-30).bool() | (k <= q), "opaque"),
    "cancelling": (lambda q, k: ((k * 1e39 - k * 1e39) == 0) & (k <= q), "causal, padding"),
    "cancelling to a rounded number": (lambda q, k: ((k.float() + 0.1) - k.float() == 0.1) & (k <= q), "causal, padding"),
    "a float as a condition": (lambda q, k: torch.logical_and(k <= q, (k + 1) * 1e-30 * 1e-30), "opaque"),
    "in halves": (lambda q, k: (k > q).half().float() * LOWEST, "causal"),
}


@pytest.mark.parametrize("table", ["TRUNCATED", "OVERFLOW", "FLOATS"])
def test_numbers_are_those_of_the_dtype(table):
    check(globals()[table], batch=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_a_number_that_the_padding_cannot_hold(dtype):
    """Compared in 64 bits in the graph: in the padding's own dtype 300 would be 44, and -1 the largest."""
    padding = torch.tensor([[44] + [1] * 11, [0, 44] + [2] * 10]).to(dtype)
    row = lambda p: p[:, None, None, :].long()
    limits = torch.iinfo(dtype)
    table = {
        "positive": (lambda q, k, p: (k <= q) & (row(p) > 0), "causal, padding"),
        "another number": (lambda q, k, p: (k <= q) & (row(p) != 300), "causal"),
        "equal": (lambda q, k, p: (k <= q) & ((row(p) == 300) | (row(p) == 1) | (k == q)), "opaque"),
        "negative": (lambda q, k, p: (k <= q) & (row(p) > -1), "causal"),
        "least": (lambda q, k, p: (k <= q) & (row(p) >= limits.min), "causal"),
        "beyond": (lambda q, k, p: (k <= q) & (row(p) <= min(limits.max + 1, 2**63 - 1)), "causal"),
    }
    check(table, padding)


# -- what the clauses are measured from ----------------------------------------------------------------------------------------------------

BOUNDS: Table = {
    "around another place": (lambda q, k, s: (k <= q) & ((k - q - s.shape[0]).abs() < 5), "opaque: the window"),
    "below another place": (lambda q, k, s: (k <= q) & (k > q + s.shape[0] - 5), "opaque: the window"),
    "a looser bound beside it": (lambda q, k, s: (k <= q) & (k <= q + s.shape[0]) & (k > q + s.shape[0] - 5), "opaque: the window"),
    "from the causal bound": (lambda q, k, s: (k <= q + s.shape[0]) & (k > q + s.shape[0] - 5), "causal from s"),
    "around a shifted place": (lambda q, k, s: (k - q - s.shape[0]).abs() < 5, "causal from s"),
    "from the queries": (lambda q, k, s: (k <= q) & ((k - q).abs() < 5) & (k <= q + s.shape[0]), "causal, window 5"),
    "without order": (lambda q, k, s: (k > q - 5) & (k < s.shape[0] + 5), "opaque"),
    "of a size": (lambda q, k, s: (k <= q) & (k > q - s.shape[0]), "opaque: the window"),
    "a product of sizes": (lambda q, k, s: k <= q + (s.shape[0] + 1) * (s.shape[0] - 1) + 1, "causal from s"),
    "a remainder": (lambda q, k, s: k <= q + s.shape[0] % 5, "causal from"),
}


@pytest.mark.parametrize("query_len", [LENGTH, 7, 1])
def test_a_window_is_measured_from_the_causal_bound(query_len):
    shift = torch.zeros(2)
    torch._dynamo.mark_dynamic(shift, 0)
    table = BOUNDS if query_len == LENGTH else {name: (make, "") for name, (make, _) in BOUNDS.items()}
    check(table, shift, query_len=query_len, batch=1)


FAR: Table = {
    "window": (lambda q, k: (k <= q) & (k > q - 2**40), "causal"),
    "start": (lambda q, k: k <= q + 2**40, "causal from"),
    "start far below": (lambda q, k: k <= q - 2**40, "causal from"),
    "product of sizes": (lambda q, k: k <= q + k.shape[1] * k.shape[1] - 100, "causal from"),
    "too large a product": (lambda q, k: k <= q - k.shape[1] ** 3, "opaque"),
}


def test_places_beyond_32_bits_of_symbolic_lengths():
    """Lengths are not known, so nothing is left out as farther than the row is long."""
    check(FAR, dynamic=True)


@pytest.mark.parametrize("start", [0, 3, 2**31 + 1, 2**40, -(2**40)])
def test_places_beyond_32_bits_in_a_tensor(start, monkeypatch):
    """The query start is handed to the op within 32 bits: kernels cut off what is above."""
    table = {
        "start": (lambda q, k, s: k <= q + s, "causal from"),
        "window": (lambda q, k, s: (k <= q + s) & (k > q + s - 4), "causal from"),
        "wide window": (lambda q, k, s: (k <= q + s) & (k > q + s - 2**40), "opaque"),
    }
    given = []
    real = reference.attention
    for family in ("reference", "cpp"):  # which of them serves depends on the machine's compiler
        monkeypatch.setitem(dispatch._TABLE["attention"], family, lambda call, **more: given.append(call.query_start) or real(call, **more))
    check(table, torch.tensor(start), batch=1)
    assert [int(x) for x in given] == [max(-(2**30), min(start, 2**30))] * 2


def test_a_leaf_has_one_row_or_those_of_the_batch():
    rows = torch.tensor([[0] * 3 + [1] * 9, [1] * 12, [0] * 5 + [1] * 7])
    pad = lambda p: p[:, None, None, :] != 0
    same = lambda d: d[:, None, :, None] == d[:, None, None, :]
    table = {
        "padding of the first row": (lambda q, k, p: (k <= q) & pad(p[:1]), ""),
        "padding of the first row, without a batch": (lambda q, k, p: (k <= q) & (p[0][None] != 0), "causal, padding"),
        "padding of another row": (lambda q, k, p: (k <= q) & (p[1][None] != 0), "causal, padding"),
        "documents of the first row": (lambda q, k, p: (k <= q) & same(p[:1]), ""),
        "documents of a row": (lambda q, k, p: (k <= q) & (p[0][:, None] == p[0][None]), ""),
        "a row for every query": (lambda q, k, p: (k <= q) & (k > 1).expand(12, 12), "causal, padding"),
        "a copied row for every query": (lambda q, k, p: (k <= q) & (k > 1).expand(12, 12).clone(), "causal, padding"),
    }
    check(table, rows, batch=1)
    check({name: form for name, form in table.items() if "first row" not in name} | {
        "padding of the first rows": (lambda q, k, p: (k <= q) & pad(p[:2]), ""),
        "padding of the last rows": (lambda q, k, p: (k <= q) & pad(p[1:]), ""),
        "documents of the first rows": (lambda q, k, p: (k <= q) & same(p[:2]), ""),
    }, rows, batch=2)  # fmt: skip
    check({"one key": (lambda q, k, p: (k <= q) & pad(p[:2, :1]), "")}, rows, batch=2, key_len=1)


@pytest.mark.parametrize(("query_len", "key_len"), [(LENGTH, 1), (1, LENGTH), (1, 1), (5, 3)])
def test_rows_and_columns_of_one(query_len, key_len):
    """A dimension of size 1 has no index left in the condition."""
    d = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4]])
    masks = [
        lambda q, k, d: k <= q - 2,
        lambda q, k, d: k >= q - 2,
        lambda q, k, d: (q >= 2) & (k <= q),
        lambda q, k, d: (k == 0) | (q < 1),
        lambda q, k, d: (k >= 5) | (k <= q),
        lambda q, k, d: (k <= 3) & (k >= 1 - q),
        lambda q, k, d: (k <= q) & (d[:, None, : q.shape[0], None] == d[:, None, None, : k.shape[1]]),
        lambda q, k, d: d[:, None, : q.shape[0], None] == d[:, None, None, : k.shape[1]],
        lambda q, k, d: d[:, None, None, : k.shape[1]] == d[:, None, None, 3:4],
        lambda q, k, d: k + torch.arange(2)[:, None, None, None] <= q,
        lambda q, k, d: (k <= q) & (torch.arange(2)[:, None, None, None] + k > 0),
        lambda q, k, d: (k <= q) & (torch.arange(2)[:, None, None] + k > 0),
    ]
    check({str(n): (make, "") for n, make in enumerate(masks)}, d, query_len=query_len, key_len=key_len)
