"""Rows that see no key hold what eager PyTorch leaves in them, for every form of mask; or their site is refused with a reason."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api, ops
from sparsify.errors import UnsupportedError
from tests.attention_functions import operands, repeat
from tests.empty_rows_oracle import BIASED, CALLS, make
from tests.harness import strict

LENGTH, HEADS, KV_HEADS, DIM = 12, 4, 2, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# the keys that may be seen, [batch, keys]: rows before the first of them see none
LEFT = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
HOLES = torch.tensor([[0] * 2 + [1, 0] * 5, [1] * 6 + [0] * 6])
ALL = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])
PADDINGS = {"left": LEFT, "holes": HOLES, "a row of padding": ALL}


DOCUMENTS = torch.tensor([[0] * 6 + [1] * 6, [7] * 3 + [8] * 9])


def visible(keep: torch.Tensor, documents: torch.Tensor, clause: str) -> torch.Tensor:
    at = torch.arange(LENGTH)
    ahead = at[:, None] - at[None]
    seen = keep.bool()[:, None, None, :]
    if clause != "padding":
        seen = seen & (ahead >= 0)
    if clause == "window":
        seen = seen & (ahead < 3)
    if clause == "documents":
        seen = seen & (documents[:, None, None, :] == documents[:, None, :, None])
    return seen


def lowest(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).min


def additive(seen: torch.Tensor, like: torch.Tensor, number: float) -> torch.Tensor:
    return torch.where(seen, torch.tensor(0.0, dtype=like.dtype), torch.tensor(number, dtype=like.dtype))


def scores(query, key):
    return query @ repeat(key, HEADS // KV_HEADS).mT * 0.25


def attend(x, value):
    return x.softmax(-1, dtype=torch.float32).to(value.dtype) @ repeat(value, HEADS // KV_HEADS)


def sdpa(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


FORMS = {
    "added lowest": lambda q, k, v, seen: attend(scores(q, k) + additive(seen, q, lowest(q)), v),
    "added -inf": lambda q, k, v, seen: attend(scores(q, k) + additive(seen, q, -torch.inf), v),
    "added in float32": lambda q, k, v, seen: attend(scores(q, k).float() + additive(seen, q.float(), lowest(q.float())), v),
    "filled lowest": lambda q, k, v, seen: attend(scores(q, k).masked_fill(~seen, lowest(q)), v),
    "filled -inf": lambda q, k, v, seen: attend(torch.where(seen, scores(q, k), -torch.inf), v),
    "sdpa bool": sdpa,
    "sdpa lowest": lambda q, k, v, seen: sdpa(q, k, v, additive(seen, q, lowest(q))),
    "sdpa -inf": lambda q, k, v, seen: sdpa(q, k, v, additive(seen, q, -torch.inf)),
}
REFUSED = {("added lowest", "fp16"), ("sdpa lowest", "fp16")}


@torch.no_grad()
def compiled(function, *inputs, **options):
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(function, backend="sparsify", options=strict(exact=True, **options), fullgraph=True)(*inputs)
    return got, [d for plan in plans for d in plan.decisions]


def check(function, *inputs, refused: bool = False):
    """Equal in every row, NaN where eager has NaN; and where refused, because of such rows."""
    want = function(*inputs)
    got, decisions = compiled(function, *inputs)
    torch.testing.assert_close(got, want, atol=BOUND[want.dtype], rtol=0, equal_nan=True)
    assert [d.method is None for d in decisions] == [refused], [d.reason for d in decisions]
    if refused:
        assert "see no key" in decisions[0].reason or "hide every key" in decisions[0].reason
    return want


def cells():
    """Every form and dtype with every clause once and every padding once; the rest is slow."""
    clauses = ("causal", "window", "documents", "padding")
    for n, (form, dtype) in enumerate(itertools.product(FORMS, DTYPES)):
        for i, (clause, padding) in enumerate(itertools.product(clauses, PADDINGS)):
            if clause == "padding" and padding != "a row of padding":  # every row sees what is no padding
                continue
            quick = (i + n) % 5 == 0
            yield pytest.param(form, dtype, clause, padding, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("form", "dtype", "clause", "padding"), list(cells()))
def test_every_form_of_mask(form, dtype, clause, padding):
    function = FORMS[form]
    inputs = operands(2, HEADS, KV_HEADS, LENGTH, dim=DIM, dtype=DTYPES[dtype])
    keep = PADDINGS[padding]
    want = check(
        lambda q, k, v, keep, ids: function(q, k, v, visible(keep, ids, clause)), *inputs, keep, DOCUMENTS, refused=(form, dtype) in REFUSED
    )
    empty = ~visible(keep, DOCUMENTS, clause).any(-1).expand(2, HEADS, LENGTH)
    assert empty.any()
    held = want[empty]
    expected = {"-inf": "nan", "bool": "zero"}.get(form.split()[-1], "mean")
    expected = "zero" if form == "sdpa -inf" else expected
    if (form, dtype) not in REFUSED:
        mean = repeat(inputs[2], 2).float().mean(2, keepdim=True).expand(2, HEADS, LENGTH, DIM)[empty]
        found = {"nan": held.isnan().all(), "zero": (held == 0).all(), "mean": (held - mean).abs().max() < 2e-2}[expected]
        assert found, "the test's own expectation"


# -- the op --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "nan", "zero"])
@pytest.mark.parametrize("name", CALLS | BIASED)
def test_the_op_equals_written_out_attention(name, form):
    call = make(form, **(CALLS | BIASED)[name])
    output, lse = ops.attention(*call.tensors, **call.options)
    want = call.written_out()
    empty = lse < ops.SUNK
    assert empty.any() and torch.equal(output.isnan(), want.isnan().to(output.device))
    if form == "zero":
        assert (output[lse == -torch.inf] == 0).all()
        want = torch.where(empty[..., None], output.float(), want)
    torch.testing.assert_close(output.float(), want, atol=BOUND[call.tensors[0].dtype], rtol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["mean", "nan"])
@pytest.mark.parametrize("name", ["padding", "window", "documents", "documents, not causal", "before the first key"])
def test_rows_that_only_block_lists_leave_without_a_key_are_zero(name, form):
    call = make(form, **{**CALLS[name], "query_len": 40, "key_len": 40})
    batch, heads, query_len, _ = call.tensors[0].shape
    blocks = -(-query_len // 8)
    lists = {"block_counts": torch.ones(batch, heads, blocks, dtype=torch.int32)}
    lists["block_indices"] = torch.full((batch, heads, blocks, 1), 3, dtype=torch.int16)
    options = call.options | lists | {"block_size": 8}
    output, lse = ops.attention(*call.tensors, **options)
    without, hidden = (lse == -torch.inf), ~call.seen.any(-1)
    assert (without & ~hidden).any() and hidden.any()
    assert (output[without & ~hidden] == 0).all()
    want = call.written_out()
    torch.testing.assert_close(output[hidden], want[hidden], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("form", "lowest"), [("other", 0.0), ("mean", 0.0), ("mean", -torch.inf)])
def test_words_that_mean_nothing_are_refused(form, lowest):
    call = make("nan")
    with pytest.raises(UnsupportedError, match="empty rows hold"):
        ops.attention(*call.tensors, **call.options | {"empty_rows": form, "lowest": lowest})
