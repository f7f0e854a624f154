"""Which implementation serves an op, and what happens to operands that do not fit together."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

import sparsify.backends as backends
from sparsify.backends import dispatch
from sparsify.backends.attention import hopper, reference, triton, triton_source
from sparsify.errors import ConfigError, KernelError, UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.call import schema_arguments
from tests.support.attention_cases import Case, make_call

CASE = Case(batch=2, kv_heads=2, group=2, query_len=12, key_len=20, lists=True, padding="left", alibi=True, sink_logits=True, start=8)


@pytest.fixture(autouse=True)
def auto():
    yield
    backends.use("auto")


def test_cpu_runs_the_reference():
    assert backends.available("cpu") == ("reference", "no GPU")
    call = make_call(CASE)
    assert all(map(torch.equal, call.run(), reference.attention(call)))


def test_cpu_never_imports_triton():
    import subprocess
    import sys
    from pathlib import Path

    # torch may import it by itself
    code = "import sys, torch; before = 'triton' in sys.modules; import sparsify.backends; sys.exit(before != ('triton' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_triton_on_a_cpu_is_refused_where_it_is_demanded():
    backends.use("triton")
    call = make_call(CASE)
    with pytest.raises(UnsupportedError, match="no GPU"):
        call.run()


def test_unknown_word():
    with pytest.raises(ConfigError, match="'auto', 'triton', 'reference'"):
        backends.use("cuda")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key", lambda x: x[:, :, :, :8], "key is .*head_dim is 16"),
        ("key", lambda x: x[:1], "key is .*batch is 2"),
        ("value", lambda x: x[:, :, :5], "value is .*key_len is 20"),
        ("query", lambda x: x[:, :3], "no multiple of 2 KV heads"),
        ("query", lambda x: x[0], "3 dimensions, not 4"),
        ("value", lambda x: x.double(), "torch.float64"),
        ("key_flags", lambda x: x[:, :7], "key_flags is"),
        ("key_flags", lambda x: x.float(), "key_flags is torch.float32"),
        ("query_start", lambda x: x.repeat(2), "query_start"),
        ("query_start", lambda x: x.float(), "query_start"),
        ("block_counts", lambda x: None, "come together"),
        ("block_counts", lambda x: x[:, :, :0], "block_indices is .*query_blocks is 0"),
        ("block_indices", lambda x: x[:, :1], "block_indices is"),
        ("alibi_slopes", lambda x: x[:, :2], "alibi_slopes is"),
        ("sink_logits", lambda x: x.long(), "sink_logits is"),
        ("windows", lambda x: (1, 2, 3), "3 windows"),
        ("windows", lambda x: (-1,), "windows"),
        ("softcap", lambda x: -1.0, "softcap"),
        ("scale", lambda x: float("nan"), "scale"),
        ("block_size", lambda x: 0, "block size 0"),
    ],
)
def test_operands_that_do_not_fit(name, change, message):
    call = make_call(CASE)
    wrong = dataclasses.replace(call, **{name: change(getattr(call, name))})
    with pytest.raises(UnsupportedError, match=message):
        wrong.run()


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"qk_head_dim": 512}, {"block_size": 24}])
def test_calls_that_no_kernel_takes(change):
    call = make_call(dataclasses.replace(CASE, **change))
    with pytest.raises(UnsupportedError, match=r"no (attention )?kernel"):
        triton.triton_attention(call)


def test_auto_falls_back_to_the_reference_and_says_so_once(monkeypatch, caplog):
    dispatch._warn_once.cache_clear()
    monkeypatch.setattr(dispatch, "available", lambda device: ("triton", "pretended"))
    call = make_call(dataclasses.replace(CASE, dtype=torch.float64))
    for _ in range(2):
        assert all(map(torch.equal, call.run(), reference.attention(call)))
    assert caplog.text.count("runs the slow reference") == 1


def test_a_kernel_that_fails_is_named(monkeypatch):
    def broken(spec):
        raise RuntimeError("PTX error\nptxas exploded")

    monkeypatch.setattr(triton, "_module", broken)
    call = make_call(dataclasses.replace(CASE, lists=False))
    with pytest.raises(KernelError, match=r"fp32, head dim 16.*ptxas exploded.*kernels = 'reference'"):
        triton.triton_attention(call)


def test_reading_flags_once_finds_their_bounds():
    flags = torch.tensor([[0, 0, 3, 1, 3, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 2, 1, 0, 0, 0, 1]], dtype=torch.uint8)
    assert triton_source._flag_bounds(flags, 3).tolist() == [[2, 6, 2, 5], [7, 0, 7, 0], [0, 7, 7, 0]]


def test_torch_agrees_with_the_schema():
    call = make_call(CASE)
    torch.library.opcheck(AttentionCall.op(), *call.arguments(), test_utils=("test_schema", "test_faketensor"))


def test_the_record_is_the_schema():
    """Whatever the dispatcher leaves out or adds, a call that goes through the op is the call that was made."""
    call, seen = make_call(CASE), []
    with_everything = dataclasses.replace(call, windows=(3,), sinks=2, softcap=1.5, seq_major=True, empty_rows="nan")
    for one in (AttentionCall(call.query, call.key, call.value, scale=1.0, causal=True), with_everything):
        args, keywords = one.arguments()
        again = AttentionCall.bind(*args, **keywords)
        seen.append(again)
        assert all(getattr(again, name) is tensor for name, tensor in one.tensors().items())
        assert again.arguments()[1].keys() == keywords.keys() and again.windows == one.windows
    fields = [argument.name for argument in schema_arguments(AttentionCall)]
    assert [*fields, "version"] == [argument.name for argument in AttentionCall.op()._schema.arguments]


def test_kernels_get_the_call(monkeypatch):
    seen = []

    def kernel(call, into=None):
        seen.append(call)
        return call.empty_outputs()

    monkeypatch.setattr(dispatch, "_implementation", lambda op, kind: kernel)
    query = torch.zeros(1, 2, 3, 4)
    AttentionCall(query, query, query, scale=0.5, causal=True, windows=(2,)).run()
    assert (seen[0].scale, seen[0].windows, seen[0].block_size, seen[0].key_flags) == (0.5, (2,), 128, None)


def test_a_kernel_refuses_arguments_that_it_does_not_know(monkeypatch):
    monkeypatch.setattr(AttentionCall, "beyond", lambda self, served: ["temperature"])
    call = make_call(
        dataclasses.replace(CASE, dtype=torch.bfloat16, query_len=64, key_len=64, qk_head_dim=64, v_head_dim=64, block_size=128)
    )
    assert hopper.serves(call, (9, 0), (3, 6)) == "temperature"
    with pytest.raises(UnsupportedError, match="temperature"):
        triton.triton_attention(call)


def test_arguments_beyond_those_that_a_kernel_knows():
    call = make_call(CASE)
    assert call.beyond({"key_flags", "query_start", "block_counts", "block_indices", "block_size"}) == ["sink_logits", "alibi_slopes"]
    assert dataclasses.replace(call, softcap=0.0, empty_rows="nan").beyond(call.tensors().keys() | {"block_size"}) == []


def test_every_op_has_a_row_and_ends_with_the_reference():
    named = {op.partition("::")[2].partition(".")[0] for op in torch._C._dispatch_get_all_op_names() if op.startswith("sparsify::")}
    made_of_others, computes_nothing = {"sparse_attention", "pattern_attention"}, {"head_numbers"}
    no_ops = {"empty_rows", "choose_pattern", "list_pattern", "prepare_keys", "take_back"}
    assert set(dispatch._TABLE) - no_ops == named - made_of_others - computes_nothing
    assert all(
        list(row) == [f for f in ("hopper", "triton", "cpp", "reference") if f in row] and "reference" in row
        for row in dispatch._TABLE.values()
    )


@pytest.fixture
def hopper_gpu(monkeypatch):
    """Pretends that this is a Hopper GPU whose kernels answer as the fixture's dict says: an error is raised, or else returned."""
    dispatch._warn_once.cache_clear()
    answers = {"hopper": "hopper", "triton": "triton", "reference": "reference"}

    def implementation(op, family):
        def kernel(*args, **options):
            if isinstance(answers[family], Exception):
                raise answers[family]
            return answers[family]

        return kernel

    monkeypatch.setattr(dispatch, "available", lambda device: ("triton", "pretended"))
    monkeypatch.setattr(dispatch.hopper, "ready", lambda device: True)
    monkeypatch.setattr(dispatch, "_implementation", implementation)
    return answers


REFUSED, FAILED = UnsupportedError("no keys"), KernelError("ptxas exploded")


@pytest.mark.parametrize(
    ("hopper", "triton", "serves", "warns"),
    [
        (None, None, "hopper", ""),
        (REFUSED, None, "triton", ""),
        (FAILED, None, "triton", "runs the triton kernel: ptxas exploded"),
        (REFUSED, REFUSED, "reference", "runs the slow reference: no keys"),
        (REFUSED, FAILED, "reference", "runs the slow reference: ptxas exploded"),
    ],
)
def test_the_first_that_takes_a_call_serves_it(hopper_gpu, caplog, hopper, triton, serves, warns):
    hopper_gpu |= {family: error for family, error in (("hopper", hopper), ("triton", triton)) if error}
    assert [dispatch.serve("attention")(torch.zeros(1)) for _ in range(2)] == [serves] * 2
    assert [record.getMessage() for record in caplog.records] == ([f"attention {warns}"] if warns else [])
    assert dispatch.serve("select_blocks")(torch.zeros(1)) == ("reference" if triton else "triton"), "it has no Hopper kernel"


@pytest.mark.parametrize(("error", "raises"), [(REFUSED, False), (FAILED, True)])
def test_strict_and_demanded_kernels_raise_failures_and_hand_on_refusals(hopper_gpu, error, raises):
    hopper_gpu["hopper"] = error
    for ways in (dispatch.serving(strict=True), dispatch.serving("triton")):
        with ways, pytest.raises(KernelError) if raises else contextlib.nullcontext():
            assert dispatch.serve("attention")(torch.zeros(1)) == "triton"
    hopper_gpu["triton"] = REFUSED
    with dispatch.serving("triton"), pytest.raises(type(error)):
        dispatch.serve("attention")(torch.zeros(1))
    if not raises:
        with dispatch.serving(strict=True):
            assert dispatch.serve("attention")(torch.zeros(1)) == "reference"
