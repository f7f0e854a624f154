"""With the mend of a fault taken out, the proof is wrong again, and running it finds that.

Each entry is one fault of the past: an argument that nobody looked at, a shortcut that a later step can feel, a bound that is not the
bound, an integer that torch would have truncated. The program is right with the mend; with it broken, validation alone stands between a
wrong proof and a wrong result.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

from sparsify.masks import numerics, prove, reader
from sparsify.masks.symbolic import Facts, scalar
from sparsify.matching import attention as match
from sparsify.matching import scores
from tests.support.harness import strict

LENGTH = 12


def sdpa(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def keys(key):
    return torch.arange(key.shape[2])[None]


# -- the programs ----------------------------------------------------------------------------------------------------------------------


def scaled_sum(query, key, value, more):
    places = torch.arange(query.shape[2])
    return sdpa(query, key, value, keys(key) <= torch.add(places, torch.ones_like(places), alpha=3)[:, None])


def mixed_range(query, key, value, more):
    past = key.shape[2] - query.shape[2]
    return sdpa(query, key, value, keys(key) <= torch.arange(past, end=key.shape[2])[:, None])


def truncated(query, key, value, more):
    limit = torch.arange(query.shape[2]) + torch.tensor(1.5, dtype=torch.int64) + torch.tensor(0.5, dtype=torch.int64)
    return sdpa(query, key, value, keys(key) <= limit[:, None])


def overflowing(query, key, value, more):
    large = torch.full((), 2**30, dtype=torch.int32)
    limit = torch.arange(query.shape[2], dtype=torch.int32) + large + large + large + large  # 2³² is 0 in 32 bits
    return sdpa(query, key, value, keys(key) <= limit[:, None])


def other_bound(query, key, value, more):
    distance = keys(key) - torch.arange(query.shape[2])[:, None]
    return sdpa(query, key, value, (distance <= 0) & ((distance - more.shape[0]).abs() < 5))


def capped_difference(query, key, value, more):
    x = query @ key.transpose(-1, -2) / 3.0
    return (torch.tanh((x - x.amax(-1, keepdim=True)) / 5.0) * 5.0).softmax(-1) @ value


def difference_beside_a_sink(query, key, value, more):
    x = query @ key.transpose(-1, -2) / 3.0
    x = x - x.amax(-1, keepdim=True)
    sink = torch.arange(1.0, 3.0)[None, :, None, None].expand(1, 2, query.shape[2], 1)
    return torch.cat([x, sink], -1).softmax(-1)[..., :-1] @ value


def mask_beside_is_causal(query, key, value, more):
    keep = torch.arange(key.shape[2])[None, None, None] > 2
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, is_causal=True)


# -- the mends, taken out --------------------------------------------------------------------------------------------------------------


def reading(name, handler):
    return lambda patch: patch.setitem(reader._READINGS, name, reader.Reading(handler, (), (), frozenset()))


def sum_without_alpha(of, node):
    """The first two operands, whatever else the call says."""
    left, right = (of.spread(a, of.read(node.args[0]).shape) for a in node.args[:2])
    return lambda *i: sympy.expand(left(*i) + right(*i))


def positional_range(of, node):
    start = scalar(node.args[0]) if len(node.args) > 1 else sympy.Integer(0)
    return lambda i: sympy.expand(start + i)


def exact_fractions(patch):
    patch.setattr(numerics, "_whole", lambda facts, value, source, target: value)


def unbounded_integers(patch):
    patch.setattr(Facts, "fits", lambda *unused: True)


def any_upper_bound(patch):
    right = prove._Proof.window

    def wrong(self, clauses, causal, start, offset):
        shifted = SimpleNamespace(upper=clauses.upper, lower=clauses.lower)
        widths = [sympy.expand(u + 1 - bound) for u in clauses.upper for bound in clauses.lower]
        numbers = [w for w in widths if w.is_Integer and w > 0]
        return (int(numbers[0]), start) if numbers else right(self, shifted, causal, start, offset)

    patch.setattr(prove._Proof, "window", wrong)


def no_shift_matters(patch):
    patch.setattr(scores.Chain, "shift_sensitive", property(lambda self: ""))


def unread_mask(patch):
    right = match._unfit
    patch.setattr(match, "_unfit", lambda context, *call: "" if "beside is_causal" in (why := right(context, *call)) else why)


FAULTS = {
    "alpha is not read": (scaled_sum, reading("add", sum_without_alpha)),
    "a start beside a keyword end is not read": (mixed_range, reading("arange", positional_range)),
    "fractions stay in integers": (truncated, exact_fractions),
    "integers do not overflow": (overflowing, unbounded_integers),
    "a window from another bound": (other_bound, any_upper_bound),
    "a shift before a softcap": (capped_difference, no_shift_matters),
    "a shift before a sink": (difference_beside_a_sink, no_shift_matters),
    "a mask beside is_causal": (mask_beside_is_causal, unread_mask),
}


def operands():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, LENGTH, 8, generator=generator) for _ in range(3))
    return query, key, value, torch.zeros(2)


def run(program, **options):
    inputs = operands()
    if program is mixed_range:
        inputs = (inputs[0][:, :, :7], *inputs[1:])
    if program is other_bound:
        torch._dynamo.mark_dynamic(inputs[3], 0)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(program, backend="sparsify", options=strict(passes=["dense"], dense={"kernel": "attention"}, **options))
        return compiled(*inputs), program(*inputs)


def refused_by_torch() -> bool:
    """Whether the fused call refuses a mask beside is_causal, as torch does from 2.14 on."""
    try:
        mask_beside_is_causal(*operands())
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_validation_finds_what_the_mend_prevents(fault, monkeypatch):
    program, broken = FAULTS[fault]
    if program is mask_beside_is_causal and refused_by_torch():
        pytest.skip("this torch refuses the pair itself")
    torch.testing.assert_close(*run(program))
    broken(monkeypatch)
    got, want = run(program, validation=False)
    assert not torch.allclose(got, want, atol=1e-3), "the fault does no harm"
    with pytest.raises(BackendCompilerFailed, match="VerifyError"):
        run(program)


def test_operators_without_a_fault_pass_under_every_mutation(monkeypatch):
    """The mutations break their own kind alone: plain causal attention is rewritten under each."""

    def plain(query, key, value, more):
        return sdpa(query, key, value, operator.le(keys(key), torch.arange(query.shape[2])[:, None]))

    for _, broken in FAULTS.values():
        with monkeypatch.context() as patch:
            broken(patch)
            torch.testing.assert_close(*run(plain))
