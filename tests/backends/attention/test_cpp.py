"""The C++ attention kernel against the reference: every clause, alone and together, rows that see nothing, tiles that are not whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings

from sparsify.backends import dispatch
from sparsify.backends.attention import cpp, reference
from sparsify.backends.codegen import cpp as compiler
from sparsify.errors import KernelError, UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.attention import AttentionCall
from tests.support.attention_cases import CLAUSES, Case, make_call
from tests.support.attention_oracle import tolerance
from tests.support.attention_strategies import cases

pytestmark = pytest.mark.skipif(compiler.obstacle() is not None, reason=str(compiler.obstacle()))


def check(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    got, wanted = cpp.launch(call), reference.attention(call)
    bound = tolerance(call.query.dtype, call)
    torch.testing.assert_close(got[0], wanted[0], atol=bound, rtol=bound)
    torch.testing.assert_close(got[1], wanted[1], atol=5e-5, rtol=1e-5)
    assert got[0].stride() == wanted[0].stride() and got[0].dtype == call.query.dtype
    return got


# tiles of 128 rows and keys, and blocks of 48: none of them whole
BASE = Case(batch=2, kv_heads=2, group=2, query_len=150, key_len=310, qk_head_dim=40, v_head_dim=24, block_size=48, seed=3)

# logits as large as ALiBi makes them for keys 260 rows away
FAR = Case(
    batch=3, kv_heads=1, group=2, query_len=278, key_len=32, qk_head_dim=1, v_head_dim=64, causal=False, windows=(5,), sinks=2, start=29,
    alibi=True, block_size=8, seed=0,
)  # fmt: skip


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause(clause):
    output, _ = check(make_call(dataclasses.replace(BASE, **CLAUSES[clause])))
    assert not torch.allclose(output, cpp.launch(make_call(BASE))[0], atol=1e-3)


@given(cases(max_len=300, dims=(1, 8, 64, 72), dtypes=(torch.float32, torch.bfloat16), block_sizes=(8, 64, 130)))
@example(FAR)
@settings(max_examples=40, deadline=None)
def test_clauses_together(case):
    check(make_call(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(make_call(dataclasses.replace(BASE, dtype=dtype, windows=(90,), sinks=2, lists=True, padding="left")))


def test_rows_without_a_key_are_zero():
    call = make_call(dataclasses.replace(BASE, query_len=200, key_len=150, sink_logits=True, alibi=True))
    output, lse = check(call)
    assert not output[:, :, :50].any() and (lse[:, :, :50] == -torch.inf).all() and lse[:, :, 50:].isfinite().all()
    unlisted = dataclasses.replace(make_call(dataclasses.replace(BASE, lists=True)))
    unlisted.block_counts[:, :, 1] = 0
    output, lse = check(unlisted)
    assert not output[:, :, 48:96].any() and (lse[:, :, 48:96] == -torch.inf).all()


def test_large_scores_and_keys_that_are_not_finite():
    """Exponentials neither overflow nor lose a row; a key that is not a number reaches the rows that see it, and those alone."""
    call = make_call(dataclasses.replace(BASE, windows=(70,)))
    check(dataclasses.replace(call, query=call.query * 100))
    call.key[:, :, 200] = torch.nan
    output, _ = cpp.launch(call)
    position = torch.arange(BASE.query_len) + BASE.key_len - BASE.query_len
    sees = (position >= 200) & (position - 70 < 200)
    assert output[:, :, sees].isnan().all() and output[:, :, ~sees].isfinite().all()
    call.value[:, :, 3] = torch.inf
    with pytest.raises(UnsupportedError, match="not finite"):
        cpp.launch(call)


def test_strides_and_given_outputs():
    """Heads last, a stride for every operand, and outputs that are parts of larger tensors."""
    case = dataclasses.replace(BASE, seq_major=True)
    call = make_call(case)
    wanted = cpp.launch(call)
    views = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    whole, lse = torch.zeros(2, 6, 150, 24), torch.zeros(2, 6, 150)
    into = whole[:, 1:5], lse[:, 1:5]
    cpp.launch(dataclasses.replace(call, **views), into=into)
    assert torch.equal(into[0], wanted[0]) and torch.equal(into[1], wanted[1]) and not whole[:, 0].any() and not lse[:, 5].any()


def test_threads_do_not_change_the_answer():
    call, before = make_call(dataclasses.replace(BASE, lists=True)), torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(cpp.launch(call))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *answers))


def test_it_serves_large_calls_on_a_cpu_and_the_reference_small_ones(monkeypatch):
    """Lists that visit a tenth of the blocks, through the op."""
    used = []
    monkeypatch.setattr(cpp.cpp, "call", lambda *args, real=compiler.call: used.append(args[1]) or real(*args))
    case = Case(kv_heads=1, group=2, query_len=1024, key_len=1024, qk_head_dim=16, v_head_dim=16, block_size=64)
    keep = (torch.rand(1, 2, 16, 16) < 0.1) | torch.eye(16, dtype=torch.bool)
    counts, indices = block_lists.from_dense(keep.tril())
    call = dataclasses.replace(make_call(case), block_counts=counts, block_indices=indices)
    torch.testing.assert_close(call.run(), reference.attention(call), atol=2e-5, rtol=2e-5)
    assert used == ["sparsify_attention"]
    small = make_call(dataclasses.replace(case, query_len=64, key_len=64))
    assert all(map(torch.equal, small.run(), reference.attention(small)))
    with dispatch.serving("reference"):
        assert all(map(torch.equal, call.run(), reference.attention(call)))
    assert len(used) == 1
    assert dispatch.attention_family(torch.device("cpu")) == ("cpp", "no GPU")


def test_without_a_compiler_the_reference_serves_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(dispatch.cpp, "obstacle", lambda: "no C++ compiler")
    assert dispatch.attention_family(torch.device("cpu")) == ("reference", "no GPU, no C++ compiler")
    assert dispatch._families("attention", torch.device("cpu")) == ("reference",)


def test_text_that_does_not_compile_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(compiler, "_built", lambda text, name, real=compiler._built: tried.append(name) or real(text, name))
    for _ in range(2):
        with pytest.raises(KernelError, match=r"could not be compiled.*nonsense.*kernels = 'reference'"):
            compiler.call("nonsense", "broken", {"size": "int64_t"}, {"size": 1})
    assert tried == ["broken"]
