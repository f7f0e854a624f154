"""The generated Hopper kernels' logic against the reference: executed on the CPU by stand-ins, clause by clause."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.attention import hopper, reference
from sparsify.backends.attention.hopper_source import arguments, generate
from tests.support import hopper_calls
from tests.support.gluon_machine import Launch, Pointer

# small enough for the CPU; the large ones differ only in how many tiles a thread block draws, which blocks=2 shows already
CASES = {
    name: call
    for name, call in hopper_calls.matrix().items()
    if not name.startswith(("many_", "dim_64_many")) and (not name.startswith("fuzz_") or int(name[5:]) < 8)
}


QUICK = (
    "ragged_not_causal", "chunk", "lists_mostly_empty", "window_per_head", "sink_logits_empty_rows", "softcap_lists", "segments_chunk",
    "padding_holes_lists", "everything", "seq_major", "dim_192_128_lists", "tuning_q1_k3v3", "huge_fp16",
)  # fmt: skip


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
@pytest.mark.samples(4)
def test_generated_kernel_computes_the_op(name):
    call = CASES[name]
    if call.heads > 8:
        call = dataclasses.replace(call, heads=4, kv_heads=2, query_len=600, key_len=600)
    one = hopper_calls.make_call(call, device="cpu")
    assert hopper.serves(one, (9, 0), (3, 6)) is None
    output, lse = _simulate(one, call.tuning)
    expected, expected_lse = reference.attention(one.in_dtype(torch.float64))
    assert not output.isnan().any()
    error = (output.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < hopper_calls.ERROR_LIMIT[call.dtype]
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-3, atol=1e-3)


def test_a_kernel_that_forgets_a_release_is_found(monkeypatch):
    monkeypatch.setattr("tests.support.gluon_machine.PATIENCE", 0.5)
    one = hopper_calls.make_call(CASES["causal"], device="cpu")
    text = generate(hopper.make_spec(one))
    broken = text.replace("mbarrier.arrive(key_empty.index(key_stage), count=1)", "pass")
    assert broken != text
    with pytest.raises(TimeoutError, match="deadlock"):
        _simulate(one, None, broken)


def test_a_kernel_that_forgets_the_causal_clause_is_found():
    one = hopper_calls.make_call(CASES["causal"], device="cpu")
    text = generate(hopper.make_spec(one))
    broken = text.replace("    visible = visible & (columns[None, :] <= rows[:, None])\n", "")
    assert broken != text
    output, _ = _simulate(one, None, broken)
    expected, _ = reference.attention(one.in_dtype(torch.float64))
    assert (output.double() - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("0f41000000", "0f7F000000"),  # a reference that is never outgrown
        ("shfl.sync.bfly.b32 d, c, 2", "shfl.sync.bfly.b32 d, c, 1"),  # half of a row's threads
        ("setp.gt.or.f32 q, $5, b, p", "setp.gt.f32 q, $5, b"),  # one row of a thread
        ("max.f32 c, c, d", "mov.f32 c, d"),  # a thread's own columns
        ("@p bra.uni KEEP", "@!p bra.uni KEEP"),  # the past shrinks where nothing moved, and not where something did
    ],
)
@pytest.mark.samples(1)
def test_assembly_that_keeps_a_wrong_reference_is_found(right, wrong):
    call = dataclasses.replace(CASES["rising"], heads=2, kv_heads=1)
    one = hopper_calls.make_call(call, device="cpu")
    text = generate(hopper.make_spec(one))
    assert right in text
    expected, _ = reference.attention(one.in_dtype(torch.float64))
    outputs = [_simulate(one, None, kernel)[0] for kernel in (text, text.replace(right, wrong))]
    errors = [(output.double() - expected).norm() / expected.norm() for output in outputs]
    assert errors[0] < hopper_calls.ERROR_LIMIT[call.dtype] and not errors[1] < 2 * errors[0]


def _simulate(call, tuning, text=None):
    output, lse = (tensor.fill_(torch.nan) for tensor in call.empty_outputs())
    spec = hopper.make_spec(call, tuning)
    found = hopper.operands(spec, call, lse)
    tensors = {"queries": call.query, "keys": call.key, "values": call.value, "outputs": output}
    given = []
    for argument in arguments(spec):
        value = tensors[argument.name] if argument.name in tensors else found[argument.name]
        if argument.type.startswith("*"):
            value = Pointer(value)
        given.append(torch.tensor(value) if argument.type == "i32" else value)
    Launch(blocks=2).run(text or generate(spec), given)
    return output, lse
