"""Which calls the Hopper kernels take, and what the launcher tells the producer about whole tiles."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.backends.attention import hopper as gluon_attention
from sparsify.backends.attention.hopper_source import DIALECTS, SHARED_LIMIT, GluonSpec, GluonTuning, arguments, generate
from sparsify.errors import KernelError
from sparsify.ops.attention import AttentionCall
from tests.support.goldens import check_kernel_text

HOPPER, RELEASE = (9, 0), (3, 6)


def call(**changes):
    query_len, dim, dtype = (changes.pop(name, default) for name, default in (("query_len", 256), ("dim", 128), ("dtype", torch.bfloat16)))
    query, key = torch.empty(1, 4, query_len, dim, dtype=dtype), torch.empty(1, 2, 256, dim, dtype=dtype)
    return AttentionCall(query, key, key, **{"scale": 0.1, "causal": True, **changes})


def test_serves_a_plain_call():
    assert gluon_attention.serves(call(), HOPPER, RELEASE) is None
    assert gluon_attention.obstacle(call()) == "no NVIDIA GPU"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dim": 320}, "head dims 320"),
        ({"dim": 100}, "head dims 100"),
        ({"query_len": 1}, "1 query rows"),
        ({"alibi_slopes": torch.ones(1, 4)}, "alibi_slopes"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"block_counts": torch.zeros(1, 4, 4), "block_size": 64}, "64-key blocks"),
    ],
)
def test_says_why_not(changes, reason):
    assert reason in gluon_attention.serves(call(**changes), HOPPER, RELEASE)


def test_other_devices_and_untried_releases_are_left_to_the_plain_kernel():
    assert "8.0" in gluon_attention.serves(call(), (8, 0), RELEASE)
    assert "10.0" in gluon_attention.serves(call(), (10, 0), RELEASE)
    assert "3.5" in gluon_attention.serves(call(), HOPPER, (3, 5))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("value_dim", [64, 128, 256])
@pytest.mark.parametrize("many", [False, True])
def test_table_of_tunings_fits_in_shared_memory(head_dim, value_dim, many):
    spec = GluonSpec(head_dim=head_dim, value_dim=value_dim, tuning=gluon_attention.choose_tuning(head_dim, value_dim, many, False))
    assert spec.shared_bytes() < SHARED_LIMIT
    generate(spec)
    # what all threads may hold together: 384 at 168 registers, in warpgroups of 128
    assert 2 * spec.tuning.consumer_registers + spec.tuning.producer_registers <= 3 * 168


@given(
    st.fixed_dictionaries(
        {name: st.booleans() for name in ("causal", "lists", "sinks", "key_flags", "segments", "start", "softcap", "sink_logits")}
    ),
    st.sampled_from(["none", "one", "heads"]),
    st.sampled_from(sorted(DIALECTS)),
)
def test_text_is_python_and_its_arguments_are_the_launchers(clauses, windows, release):
    spec = GluonSpec(windows=windows, **clauses)
    names: list[str] = []
    text = generate(spec, release)
    compile(text, "generated", "exec")
    signature = text.split("def attention(\n")[1].split("):\n")[0]
    names = [line.strip(" ,") for line in signature.splitlines()]
    assert names == [argument.name for argument in arguments(spec)]
    assert ("segments" in text) >= clauses["segments"] and "%if" not in text
    assert not re.search(r"\$[A-Z{]", text), "only PTX operands keep their sign"


@pytest.mark.parametrize(
    ("name", "spec"),
    {
        "causal": GluonSpec(tuning=gluon_attention.choose_tuning(128, 128, False, False)),
        "lists_padded_window_per_head": GluonSpec(
            lists=True, key_flags=True, windows="heads", tuning=gluon_attention.choose_tuning(128, 128, True, True, lists=True)
        ),
        "segments_window_sinks": GluonSpec(
            head_dim=256, value_dim=256, segments=True, windows="one", sinks=True,
            tuning=gluon_attention.choose_tuning(256, 256, True, False),
        ),
        "logits": GluonSpec(
            dtype="fp16", head_dim=64, value_dim=64, start=True, softcap=True, sink_logits=True,
            tuning=gluon_attention.choose_tuning(64, 64, False, False),
        ),
    }.items(),
)  # fmt: skip
def test_golden_text(name, spec):
    check_kernel_text(f"hopper_{name}", generate(spec))


def test_a_clause_that_is_not_asked_for_leaves_no_code():
    plain, full = generate(GluonSpec()), generate(GluonSpec(windows="one", segments=True))
    assert "segment_low = segments[0]" in full and "segment_low = segments[0]" not in plain
    assert len(plain) < len(full)


@pytest.mark.parametrize(
    "tuning",
    [GluonTuning(key_stages=3, value_stages=3), GluonTuning(key_stages=1), GluonTuning(order="all"), GluonTuning(value_delay=2)],
)
def test_impossible_tunings_are_refused(tuning):
    with pytest.raises(KernelError):
        generate(GluonSpec(tuning=tuning))


@given(st.integers(1, 300), st.integers(0, 1 << 30))
def test_flag_tiles(key_len, seed):
    flags = torch.randint(0, 4, (2, key_len), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    flags[0, : key_len // 2] |= 1
    found = gluon_attention.flag_tiles(flags, 64)
    for row in range(2):
        for number in range(-(-key_len // 64)):
            tile = flags[row, 64 * number : 64 * (number + 1)]
            whole = bool((tile & 1).all()) and len(tile) == 64
            expected = int((tile & 1).any()) + 2 * whole + 4 * int((tile == 3).any())
            assert found["flag_tiles"][row, number] == expected
        sinks = (flags[row] == 3).nonzero()
        assert found["sink_tiles"][row] == (int(sinks[-1]) // 64 + 1 if len(sinks) else 0)


def test_segment_tiles():
    segments = torch.tensor([[0] * 60 + [1] * 10 + [2] * 30], dtype=torch.int32)
    found = gluon_attention.segment_tiles(segments, 64)
    assert found["segment_low"].tolist() == [[0, 1]] and found["segment_high"].tolist() == [[1, 2]]


def test_layouts_that_the_copy_engine_takes():
    tensor = torch.empty(2, 100, 4, 128, dtype=torch.bfloat16)
    assert gluon_attention.copyable(tensor) and gluon_attention.copyable(tensor.transpose(1, 2))
    assert gluon_attention.copyable(tensor[:1].transpose(1, 2))
    assert not gluon_attention.copyable(tensor.transpose(2, 3))
    assert not gluon_attention.copyable(tensor[:1].expand(2, -1, -1, -1))
    assert not gluon_attention.copyable(torch.empty(1, 1, 100, 100, dtype=torch.bfloat16)[..., :96])


@pytest.mark.skipif(gluon_attention.triton_release() not in DIALECTS, reason="a Triton that was not tried")
def test_descriptors_are_those_that_their_class_makes():
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    tensor = torch.empty(2, 100, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
    for one in (tensor, tensor.clone(), tensor[:1]):
        found = gluon_attention._descriptor(one, 64, 128)
        strides = [1024, *one.stride()[1:]] if one.shape[0] == 1 else list(one.stride())
        assert found == TensorDescriptor(one, list(one.shape), strides, [1, 1, 64, 128], found.layout)
        assert found.base is one
