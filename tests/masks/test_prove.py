"""Masks are proved or refused, never misread: what a predicate says is compared with the mask that the graph computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.masks.predicate import MaskKind
from tests.support.cases import examples as drawn
from tests.support.soundness import Capture

LOWEST = torch.finfo(torch.float32).min


def operands(query_len: int, key_len: int, batch: int = 2, heads: int = 2, dim: int = 8):
    generator = torch.Generator().manual_seed(0)
    make = lambda length: torch.randn(batch, heads, length, dim, generator=generator)
    return make(query_len), make(key_len), make(key_len)


def capture(function, *inputs, dynamic=False) -> Capture:
    torch._dynamo.reset()
    found = Capture()
    with torch.no_grad():
        torch.compile(function, backend=found, dynamic=dynamic, fullgraph=True)(*inputs)
    return found


def prove(make_mask, query_len=6, key_len=6, *extra, dynamic=False):
    """The proof of one mask; `make_mask(q, k, *extra)` gets the index tensors [query_len, 1] and [1, key_len]."""

    def function(query, key, value, *extra):
        q = torch.arange(query.shape[2])[:, None]
        k = torch.arange(key.shape[2])[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=make_mask(q, k, *extra))

    found = capture(function, *operands(query_len, key_len), *extra, dynamic=dynamic)
    assert len(found.flat) == 1
    site = found.flat[0]
    assert (found.checked == []) == site.mask.opaque
    return site.mask


def pad(key_len=6, dtype=torch.long):
    mask = torch.ones(2, key_len, dtype=dtype)
    mask[0, :2] = 0
    return mask


PROVED = {
    "causal": (lambda q, k: k <= q, "causal"),
    "causal as a triangle": (lambda q, k: torch.ones(6, 6, dtype=torch.bool).tril(), "causal"),
    "strict": (lambda q, k: k < q + 1, "causal"),
    "negated": (lambda q, k: ~(k > q), "causal"),
    "window": (lambda q, k: (k <= q) & (k > q - 3), "causal, window 3"),
    "window by distance": (lambda q, k: (q - k < 3) & (q >= k), "causal, window 3"),
    "window wider than the keys": (lambda q, k: (k <= q) & (k > q - 6), "causal"),
    "two windows": (lambda q, k: (k <= q) & (k > q - 3) & (k > q - 4), "causal, window 3"),
    "limit past the end": (lambda q, k: (k <= q) & (k < 6), "causal"),
    "limit that causality implies": (lambda q, k: (k <= q - 1) & (k < 5), "causal from -1"),
    "keys start late": (lambda q, k: (k <= q) & (k > 1), "causal, padding"),
    "everything": (lambda q, k: (k >= 0) & (q >= 0), "none"),
    "union that is everything": (lambda q, k: (k <= q) | (k >= 0), "none"),
    "where": (lambda q, k: torch.where(k <= q, k > q - 3, False), "causal, window 3"),
    "both sides": (lambda q, k: (k <= q + 2) & (k >= q - 2), "causal from 2, window 5"),
    "minus infinity": (lambda q, k: torch.where(k <= q, 0.0, float("-inf")), "causal"),
    "lowest": (lambda q, k: torch.zeros(6, 6).masked_fill(k > q, LOWEST), "causal"),
    "one minus mask": (lambda q, k: (1.0 - (k <= q).float()) * LOWEST, "causal"),
    "upper triangle": (lambda q, k: torch.full((6, 6), float("-inf")).triu(1), "causal"),
    "sum of two": (lambda q, k: torch.where(k <= q, 0.0, LOWEST) + torch.where(k > q - 3, 0.0, LOWEST), "causal, window 3"),
}


@pytest.mark.parametrize("name", PROVED)
def test_proved(name):
    make, words = PROVED[name]
    assert prove(make).describe() == words


@pytest.mark.parametrize(
    ("query_len", "offset", "words"),
    [
        (2, 4, "causal"),
        (2, 0, "causal from 0"),
        (2, 1, "causal from 1"),
        (2, -1, "causal from -1"),
        (1, 5, "causal"),
        (1, 2, "causal from 2"),
    ],
)
def test_offsets(query_len, offset, words):
    assert prove(lambda q, k: k <= q + offset, query_len).describe() == words


def test_offset_in_a_tensor():
    def function(query, key, value, start):
        q, k = torch.arange(2)[:, None] + start, torch.arange(6)[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=(k <= q) & (k > q - 3))

    found = capture(function, *operands(2, 6), torch.tensor(3))
    assert found.masks == ["causal from l_start_, window 3"] and len(found.checked) == 1


PADDING = {
    "not zero": lambda p: p != 0,
    "conversion": lambda p: p.bool(),
    "equal to one": lambda p: p == 1,
    "positive": lambda p: p > 0,
    "not equal to zero": lambda p: ~(p == 0),
}


@pytest.mark.parametrize("name", PADDING)
@pytest.mark.parametrize("values", ["0/1", "0/-2"])
def test_padding_forms(name, values):
    """`== 1` and `> 0` are not `!= 0`: the leaf is then the comparison, not the tensor."""
    mask = pad() if values == "0/1" else -2 * pad()
    proof = prove(lambda q, k, p: (k <= q) & PADDING[name](p)[:, None, None, :], 6, 6, mask)
    assert proof.describe() == "causal, padding"


def test_padding_by_index_and_shift():
    def make(q, k, p):
        rows = torch.arange(2)[:, None, None, None]
        return (k <= q)[None, None] & p[rows, (k + 2)[None, None]]

    proof = prove(make, 6, 6, pad(8, torch.bool))
    assert proof.describe() == "causal, padding" and proof.padding.shift == 2


def test_padding_extended_with_zeros_is_read_from_the_extended_tensor():
    """A leaf shorter than the keys would be read out of bounds."""
    proof = prove(lambda q, k, p: (k <= q) & F.pad(p, (0, 2)).bool()[:, None, None, :], 6, 6, pad(4))
    assert proof.padding.node.op != "placeholder"


def test_documents():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1]])
    proof = prove(lambda q, k, d: (k <= q) & (d[:, None, :, None] == d[:, None, None, :]), 6, 6, documents)
    assert proof.describe() == "causal, documents"


def test_documents_of_the_last_queries():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1]])
    make = lambda q, k, d, s: (k <= q + s) & (d[:, None, s:, None] == d[:, None, None, :])
    assert prove(lambda q, k, d: make(q, k, d, 4), 2, 6, documents).describe() == "causal, documents"
    assert prove(lambda q, k, d: (k <= q + 3) & (d[:, None, 4:, None] == d[:, None, None, :]), 2, 6, documents).opaque


def test_packed_positions_are_documents():
    """Within a run of consecutive positions, comparing positions is comparing places."""

    def make(q, k, p):
        d = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return (d[:, None, :, None] == d[:, None, None, :]) & (p[:, None, None, :] <= p[:, None, :, None])

    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    assert prove(make, 6, 6, positions).describe() == "causal, documents"
    assert prove(lambda q, k, p: p[:, None, None, :] <= p[:, None, :, None], 6, 6, positions).opaque


CHUNKS = {
    "chunks": lambda q, k, pad: k // 2 == q // 2,
    "causal chunks": lambda q, k, pad: (k <= q) & (k // 4 == q // 4),
    "chunks behind padding": lambda q, k, pad: (k <= q) & ((k - pad) // 2 == (q - pad) // 2),
    "itself alone": lambda q, k, pad: k == q,
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_documents(name):
    """Llama 4's attention in chunks: any number of the key that equals the same number of the query."""
    pad = torch.tensor([1, 3])[:, None, None, None]
    expected = "causal, documents" if name.startswith(("causal", "chunks behind")) else "documents"
    assert prove(CHUNKS[name], 6, 6, pad).describe() == expected
    assert prove(lambda q, k, pad: (k <= q + 4) & CHUNKS[name](q + 4, k, pad), 2, 6, pad).describe() == "causal, documents"


@pytest.mark.parametrize(("places", "words"), [(0, "causal, documents"), (1, "other positions")])
def test_chunks_after_keys_were_dropped(places, words):
    """As with Llama 4's cache, which keeps a chunk's keys: where they start is a maximum that the sizes decide."""

    def function(query, key, value, past):
        begun = past.shape[0]
        if begun < 3:
            raise ValueError("nothing was dropped")
        q, k = torch.arange(query.shape[2])[:, None] + begun, torch.arange(key.shape[2])[None] + max(0, begun - 3)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=(k <= q) & (k // 4 == (q + places) // 4))

    query, key, value = operands(2, 5)
    past = torch.zeros(6)
    torch._dynamo.mark_dynamic(past, 0)
    found = capture(function, query, key, value, past, dynamic=None)
    assert len(found.masks) == 1 and words in found.masks[0] + found.flat[0].mask.reason


OPAQUE = {
    "prefix": (lambda q, k: (k <= q) | (k < 2), "disjunction"),
    "chunks by a tensor": (lambda q, k: k // (k + 1) == q // (q + 1), ""),
    "chunks of other places": (lambda q, k: (k <= q) & (k // 2 == (q + 1) // 2), "other positions"),
    "chunks of two sizes": (lambda q, k: (k // 2 == q // 2) & (k // 3 == q // 3), "two document masks"),
    "keys end early": (lambda q, k: (k <= q) & (k < 3), "keys end at 2"),
    "strided": (lambda q, k: k * 2 <= q, ""),
    "nothing": (lambda q, k: k < 0, "hides every key"),
    "a bias": (lambda q, k: torch.where(k <= q, (k - q) * 0.5, float("-inf")), ""),
    "rounded positions": (lambda q, k: k.half() <= q.half(), ""),
    "narrow integers": (lambda q, k: k.to(torch.uint8) - 3 <= q.to(torch.uint8), ""),
    "written in place": (lambda q, k: torch.ones(6, 6, dtype=torch.bool).logical_and_(k <= q), ""),
    "not NaN": (lambda q, k: (k <= q).float() * float("-inf"), ""),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque(name):
    make, words = OPAQUE[name]
    proof = prove(make)
    assert proof.opaque and words in proof.reason


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_comes_in_is_opaque(dtype):
    mask = torch.ones(2, 1, 6, 6, dtype=dtype) * (0 if dtype is torch.float32 else 1)
    proof = prove(lambda q, k, m: m, 6, 6, mask.to(dtype))
    assert proof.reason == "the mask is an input of the graph"


def test_a_tensor_that_changes_between_reading_and_use():
    """The view is read after the write: what the placeholder held before does not count."""

    def after(query, key, value, start):
        later = start.expand(1)
        start.add_(1)
        k = torch.arange(6)[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=k <= torch.arange(2)[:, None] + later)

    def before(query, key, value, start):
        mask = torch.arange(6)[None] <= torch.arange(2)[:, None] + start
        start.add_(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    assert "is written while" in capture(after, *operands(2, 6), torch.tensor([2])).flat[0].mask.reason
    assert capture(before, *operands(2, 6), torch.tensor([2])).masks == ["causal from l_start_"]


@pytest.mark.parametrize(
    ("query_len", "key_len", "words"), [(6, 6, "causal"), (2, 6, "causal from 0"), (1, 6, "causal from 0"), (1, 1, "causal")]
)
def test_is_causal_counts_from_the_top_left(query_len, key_len, words):
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = capture(function, *operands(query_len, key_len))
    assert found.masks == [words] and len(found.checked) == 1


def test_no_guard_is_installed():
    """Proofs about symbolic sizes leave one graph for all lengths."""
    torch._dynamo.reset()
    found = Capture()

    def function(query, key, value):
        q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        mask = (k <= q + key.shape[2] - query.shape[2]) & (k > q + key.shape[2] - query.shape[2] - 4)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)

    compiled = torch.compile(function, backend=found, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for query_len, key_len in [(5, 9), (6, 8), (3, 17), (9, 40)]:
            compiled(*operands(query_len, key_len))
    assert found.masks == ["causal, window 4"] and len(found.checked) == 4


@pytest.mark.parametrize("change", [{"window": 4}, {"causal": False}, {"padding": None}])
def test_the_check_itself_notices_a_wrong_record(change, monkeypatch):
    from tests.support import soundness

    honest = soundness.find_attention
    spoil = lambda site: dataclasses.replace(site, mask=dataclasses.replace(site.mask, **change))
    monkeypatch.setattr(soundness, "find_attention", lambda gm: [spoil(s) for s in honest(gm)])
    with pytest.raises(AssertionError):
        prove(lambda q, k, p: (k <= q) & (k > q - 3) & p.bool()[:, None, None, :], 6, 6, pad())


# -- composed masks ---------------------------------------------------------------------------------------------------------------

ATOMS = {
    "causal": lambda q, k, d, n: k <= q + n,
    "window": lambda q, k, d, n: q - k < n + 2,
    "lower": lambda q, k, d, n: k >= q - n,
    "prefix": lambda q, k, d, n: k < n + 2,
    "padding": lambda q, k, d, n: d["pad"][:, None, None, :] != 0,
    "padding equals": lambda q, k, d, n: d["pad"][:, None, None, :] == n,
    "padding indexed": lambda q, k, d, n: d["wide"][torch.arange(2)[:, None, None, None], (k + n * (n > 0))[None, None]],
    "documents": lambda q, k, d, n: d["documents"][:, None, : q.shape[0], None] == d["documents"][:, None, None, : k.shape[1]],
    "from tensor": lambda q, k, d, n: k <= q + d["start"],
    "any": lambda q, k, d, n: d["any"],
    "key even": lambda q, k, d, n: k % 2 == 0,
}
JOINS = {
    "and": lambda x, y: x & y,
    "and again": lambda x, y: torch.logical_and(x, y),
    "or": lambda x, y: x | y,
    "where": lambda x, y: torch.where(x, y, False),
    "unless": lambda x, y: x & ~y,
    "filled": lambda x, y: torch.masked_fill(x.expand(torch.broadcast_shapes(x.shape, y.shape)), ~y, False),
    "equal": lambda x, y: x == y,
    "times": lambda x, y: x * y,
}
FORMS = {
    "bool": lambda m: m,
    "where": lambda m: torch.where(m, 0.0, float("-inf")),
    "lowest": lambda m: (1 - m.to(torch.float32)) * LOWEST,
    "filled": lambda m: torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, LOWEST),
    "doubled": lambda m: torch.where(m, 0.0, LOWEST) + torch.where(m, 0.0, LOWEST),
}
atoms = st.tuples(st.sampled_from(sorted(ATOMS)), st.integers(-1, 4))
# mostly conjunctions: random connectives would leave nothing to prove
joins = st.one_of(st.just("and"), st.just("and"), st.sampled_from(sorted(JOINS)))
PARTS = {
    "first": atoms,
    "rest": st.lists(st.tuples(joins, atoms), max_size=3),
    "form": st.sampled_from(sorted(FORMS)),
    "lengths": st.sampled_from([(6, 6), (3, 7), (1, 6), (1, 1), (5, 3)]),
    "dynamic": st.booleans(),
}


@drawn(quick=25, slow=300)
def test_composed_masks_are_never_misread(examples):
    seen = dict.fromkeys(MaskKind, 0)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(**PARTS)
    def one(first, rest, form, lengths, dynamic):
        query_len, key_len = lengths
        generator = torch.Generator().manual_seed(query_len)
        draw = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
        data = {
            "pad": draw(3, 2, key_len),
            "wide": draw(2, 2, key_len + 8).bool(),
            "documents": draw(2, 2, max(lengths)).cumsum(-1),
            "start": torch.tensor(2),
            "any": draw(2, 2, 1, query_len, key_len).bool(),
        }

        def function(query, key, value, data):
            q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
            mask = ATOMS[first[0]](q, k, data, first[1])
            for join, (name, n) in rest:
                mask = JOINS[join](mask, ATOMS[name](q, k, data, n))
            return F.scaled_dot_product_attention(query, key, value, attn_mask=FORMS[form](mask), scale=0.4)

        for site in capture(function, *operands(query_len, key_len), data, dynamic=dynamic).flat:
            seen[site.mask.kind] += 1

    one()
    # draws follow the numbers in the source text (hypothesis), so the counts vary with any change of it
    assert min(seen[MaskKind.PROVED], seen[MaskKind.OPAQUE]) >= examples // 8, seen
