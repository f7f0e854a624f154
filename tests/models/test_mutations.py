"""Broken on purpose, the product must fail these checks: what they are worth is what they catch.

Every mutation is one plausible mistake. The check that is named beside it passes on the real code and raises on the broken one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import sympy
import torch

from sparsify.backends.attention import reference
from sparsify.backends.select import reference as reference_select
from sparsify.errors import VerifyError
from sparsify.graph import aliasing
from sparsify.masks import prove as predicates
from sparsify.masks.predicate import QueryStart
from sparsify.matching import eager
from sparsify.ops.attention import AttentionCall
from sparsify.ops.call import schema_arguments
from sparsify.ops.selection import SelectCall
from sparsify.rewriting import editor
from tests.fuzz import check as fuzz_check
from tests.fuzz import test_fuzz
from tests.fuzz.check import Wrong, check
from tests.fuzz.graphs import Program
from tests.models import test_metamorphic
from tests.support import attention_cases
from tests.support.attention_oracle import attention_exact, tolerance
from tests.support.select_oracle import assert_selection

PROGRAM = """
import contextlib

import torch
import torch.nn.functional as F

B, H, Q, K, D = 2, 2, 9, 12, 4


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randn(B, H, length, D, generator=generator)
    keep = torch.ones(B, K, dtype=torch.long)
    keep[0, :3] = 0
    return {{"query": draw(Q), "key": draw(K), "value": draw(K), "keep": keep, "documents": torch.arange(K).expand(B, K) // 5}}


def mark(tensors):
    return tensors


def around():
    return contextlib.nullcontext()


def masks(keep, documents):
    q, k = torch.arange(Q)[:, None] + K - Q, torch.arange(K)[None]
    keep, documents = keep[:, None, None, :] != 0, documents[:, None, None, :] == documents[:, None, K - Q :, None]
    return {mask}


def visible(x):
    return masks(x["keep"], x["documents"]).expand(B, H, Q, K).any(-1)


def program(query, key, value, keep, documents):
    mask = masks(keep, documents)
    {body}
"""
SDPA = "return F.scaled_dot_product_attention(query, key, value, attn_mask=mask),"
WRITTEN = "return torch.softmax((query @ key.transpose(-1, -2) * 0.7).masked_fill(~mask, float('-inf')), -1) @ value,"


def program(mask: str = "k <= q", body: str = SDPA) -> Callable[[], None]:
    """Checks one fixed program as the fuzzer checks its random ones."""
    return lambda: check(Program(PROGRAM.format(mask=mask, body=body), 0))


def caught_twice(checked: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation finds the mistake when the site is compiled; without it, the fuzzer finds the result wrong."""
    with pytest.raises(VerifyError, match="does not hold when it is run"):
        checked()
    monkeypatch.setattr(fuzz_check, "STRICT", {**fuzz_check.STRICT, "validation": False})
    with pytest.raises(Wrong):
        checked()


# -- what a mask says ------------------------------------------------------------------------------------------------------------------


def proof(**changes: Callable) -> Callable:
    """`predicates.prove` with some fields of its records replaced, as functions of the record and of the site's sizes."""
    real = predicates.prove

    def broken(masks, extents, *rest):
        found = real(masks, extents, *rest)
        return found if found.opaque else dataclasses.replace(found, **{name: f(found, extents) for name, f in changes.items()})

    return broken


def shifted(by: int) -> Callable:
    return lambda found, extents: QueryStart(constant=sympy.expand(extents.key_len - extents.query_len + by))


PROOFS = {
    "causal looks one key ahead": (program(), proof(query_start=shifted(1))),
    "causal misses its own key": (program(), proof(query_start=shifted(-1))),
    "causal starts at the top left": (program(), proof(query_start=lambda found, extents: QueryStart(constant=sympy.Integer(0)))),
    "causality dropped": (program(), proof(causal=lambda found, extents: False)),
    "window one too wide": (program("(k <= q) & (k > q - 4)"), proof(window=lambda found, extents: found.window + 1)),
    "window one too narrow": (program("(k <= q) & (k > q - 4)"), proof(window=lambda found, extents: found.window - 1)),
    "window dropped": (program("(k <= q) & (k > q - 4)", WRITTEN), proof(window=lambda found, extents: None)),
    "padding dropped": (program("(k <= q) & keep"), proof(padding=lambda found, extents: None)),
    "documents dropped": (program("(k <= q) & documents", WRITTEN), proof(documents=lambda found, extents: None)),
}


@pytest.mark.parametrize("name", PROOFS)
@pytest.mark.samples(5)
def test_a_wrong_proof_is_caught(name, monkeypatch):
    checked, broken = PROOFS[name]
    checked()
    monkeypatch.setattr(predicates, "prove", broken)
    caught_twice(checked, monkeypatch)


WRITES = {
    "keys": "scores = query @ key.transpose(-1, -2); key.mul_(3.0); weights = torch.softmax(scores.masked_fill(~mask, float('-inf')), -1); "
    "return weights @ value,",
    "keys after their copy": "wide = key.repeat_interleave(1, dim=1); key.mul_(3.0); "
    "return F.scaled_dot_product_attention(query, wide, value, attn_mask=mask),",
}


@pytest.mark.parametrize("name", WRITES)
def test_an_unseen_write_is_caught(name, monkeypatch):
    checked = program(body=WRITES[name])
    checked()
    monkeypatch.setattr(aliasing.Memory, "written_between", lambda self, node, first, last: False)
    caught_twice(checked, monkeypatch)


@pytest.mark.parametrize("name", test_fuzz.COPIES)
def test_a_copy_taken_for_its_original_is_caught(name, monkeypatch):
    monkeypatch.setattr(eager._WrittenOut, "unwritten", lambda *reading: True)
    caught_twice(lambda: test_fuzz.check_copies(name, "bfloat16"), monkeypatch)


# -- which blocks are chosen -----------------------------------------------------------------------------------------------------------


def selection(**changes: object) -> None:
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 2, 150, 8), torch.randn(1, 1, 150, 8)
    call = SelectCall(query, key, **{"scale": 0.4, "causal": True, "block_size": 32, "threshold": (0.4,), **changes})
    assert_selection(*reference_select.select_blocks(call), call)


def candidates(change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> tuple[str, Callable]:
    real = reference_select.candidates
    return "candidates", lambda call: change(*real(call))


def without_diagonal(possible, forced):
    return possible, forced & ~torch.eye(forced.shape[-2], forced.shape[-1], dtype=torch.bool)


def sink_as_row(possible, forced):
    forced = forced.clone()
    forced[..., 1:, 0] = False
    forced[..., 0, :] = True
    return possible | forced, forced


def without_causality(possible, forced):
    return torch.ones_like(possible), forced


def threshold_of_the_rest(importance, possible, forced, call):
    """The share is taken of what is not forced, instead of the whole row."""
    rest = importance.masked_fill(forced.expand_as(importance), 0)
    return real_choose(rest, possible, forced, call)


def everything(importance, possible, forced, call):
    return possible.expand_as(importance)


def smallest_first(importance, possible, forced, call):
    return real_choose(importance.amax(-1, keepdim=True) - importance, possible, forced, call)


def other_pool(call):
    return real_importances(dataclasses.replace(call, pool="max"))


def one_cell_for_all(importance, possible, forced, call):
    """Under the row rule, the block's mean row decides."""
    return real_choose(importance.mean(-2, keepdim=True), possible, forced, call)


real_choose, real_importances = reference_select.choose, reference_select.importances
SELECTIONS = {
    "the diagonal is not forced": (selection, *candidates(without_diagonal)),
    "the sink is a row": (selection, *candidates(sink_as_row)),
    "blocks of the future": (lambda: selection(threshold=(1.0,)), *candidates(without_causality)),
    "another total": (selection, "choose", threshold_of_the_rest),
    "keeps everything": (selection, "choose", everything),
    "the least important first": (selection, "choose", smallest_first),
    "another pool": (lambda: selection(pool="sum", stride=4, threshold=(0.7,)), "importances", other_pool),
    "one cell for all": (lambda: selection(pool="row", stride=4, threshold=(0.4,)), "choose", one_cell_for_all),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_wrong_selection_is_caught(name, monkeypatch):
    checked, function, broken = SELECTIONS[name]
    checked()
    monkeypatch.setattr(reference_select, function, broken)
    with pytest.raises(AssertionError):
        checked()


# -- what attention computes -----------------------------------------------------------------------------------------------------------


def clause_call(clause: str) -> AttentionCall:
    sizes = {"kv_heads": 2, "group": 2, "query_len": 24, "key_len": 40, "batch": 2, "block_size": 8}
    return attention_cases.make_call(attention_cases.Case(**sizes, **attention_cases.CLAUSES.get(clause, {})))


def kernel(clause: str) -> None:
    """The reference against the plain definition on a call where that clause matters."""
    call = clause_call(clause)
    got, lse = reference.attention(call)
    want, want_lse = attention_exact(call)
    assert (got - want).abs().max() < tolerance(torch.float32)
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse - want_lse)[seen].abs().max() < 1e-4


def ignored(clause: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Changes that leave out what a clause sets, each argument by itself; of a clause that sets none, causality."""
    plain, call = clause_call("plain"), clause_call(clause)
    defaults = {argument.name: argument.default for argument in schema_arguments(AttentionCall)}
    names = call.beyond(plain.beyond(()))
    for name in names:
        if name == "sinks" and call.key_flags is not None:  # the flags say which keys are sinks
            continue
        if name == "block_counts":
            yield "lists", dict.fromkeys(("block_counts", "block_indices"))
        elif name != "block_indices":
            yield name, {name: defaults[name]}
        if isinstance(value := getattr(call, name), tuple) and len(value) > 1:
            yield f"{name} of other heads", {name: value[-1:]}
    if not names:
        yield "causal", {"causal": not call.causal}


IGNORED = {f"{clause}: {name}": (clause, change) for clause in ("plain", *attention_cases.CLAUSES) for name, change in ignored(clause)}


@pytest.mark.parametrize("name", IGNORED)
def test_a_kernel_that_ignores_a_clause_is_caught(name, monkeypatch):
    clause, change = IGNORED[name]
    kernel(clause)
    real = reference.attention
    monkeypatch.setattr(reference, "attention", lambda call: real(dataclasses.replace(call, **change)))
    with pytest.raises(AssertionError):
        kernel(clause)


@pytest.mark.parametrize("mask", ["k <= q", "(k <= q) & keep", "(k <= q) & documents", "(k <= q) & (k > q - 3)"])
def test_a_kernel_without_masks_is_caught_end_to_end(mask, monkeypatch):
    checked = program(mask)
    monkeypatch.setattr(fuzz_check, "STRICT", {**fuzz_check.STRICT, "validation": False})  # which runs the reference, broken here
    checked()
    everything = lambda self, rows, keys: torch.ones(1, 1, rows.numel(), keys.numel(), dtype=torch.bool)
    monkeypatch.setattr(reference.Mask, "visible", everything)
    with pytest.raises(Wrong):
        checked()


def test_other_heads_of_a_group_are_caught(monkeypatch):
    kernel("plain")
    real = reference.attention
    mixed = lambda call: real(dataclasses.replace(call, key=call.key.flip(1), value=call.value.flip(1)))
    monkeypatch.setattr(reference, "attention", mixed)
    with pytest.raises(AssertionError):
        kernel("plain")


# -- what results must not depend on ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sinks_counted_from_key_zero_are_caught(monkeypatch):
    """With padding on the left, sinks are the first real keys."""

    def broken(self, rows, leaf, sinks):
        flags = self.method("to", self.call(torch.ne, rows, 0), torch.uint8)
        if not sinks:
            return flags
        places = self.method("cumsum", self.call(torch.ones_like, rows), -1)
        sink = self.method("to", self.call(torch.le, places, sinks), torch.uint8)
        return self.call(torch.add, flags, self.call(torch.mul, sink, 2))

    monkeypatch.setattr(editor.Editor, "_key_flags", broken)
    with pytest.raises(AssertionError):
        test_metamorphic.check_padding("sink_window", "left", (13,))


def test_one_selection_for_all_batch_rows_is_caught(monkeypatch):
    real = reference_select.importances
    first_row = lambda call: ((rows, mass[:1].expand(call.batch, -1, -1, -1)) for rows, mass in real(call))
    monkeypatch.setattr(reference_select, "importances", first_row)
    with pytest.raises(AssertionError):
        test_metamorphic.check_permuted_rows("xattention", 6 * test_metamorphic.BLOCK)
