"""What serves the cache ops when their kernels fail: the reference with one warning, and an error where that was asked for."""

from __future__ import annotations

import logging

import pytest
import torch

from sparsify.backends import dispatch as launch
from sparsify.errors import KernelError, UnsupportedError
from sparsify.ops import cache as cache_ops
from tests.policies.test_policies import new_state

OPTIONS = {"scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0, "version": cache_ops.VERSION}
OPS = ["cache_decode", "cache_attention"]


def call(op, seed=0):
    """Output and state of an op's call over a layer that holds three tokens."""
    torch.manual_seed(seed)
    state, key = new_state(2, 2, 6, 8), torch.randn(2, 2, 3, 8)
    stored = {"pinned": 0, "recent": 6, "policy": '{"name": "streaming_llm", "window": 6}', "scale": 0.3, "softcap": 0.0}
    cache_ops.store(None, key, key, *state, empty=True, version=cache_ops.VERSION, **stored)
    if op == "cache_decode":
        key = torch.randn(2, 2, 1, 8)
        return cache_ops.decode(torch.randn(2, 4, 1, 8), key, key, *state, pinned=0, **OPTIONS), state
    key = torch.randn(2, 2, 5, 8)
    keys, values, positions, _, seen, _ = state
    query = torch.randn(2, 4, 5, 8)
    return cache_ops.attention(query, keys, values, positions, seen, new_key=key, new_value=key, **OPTIONS), state


@pytest.fixture
def failing(monkeypatch, caplog):
    """Pretends that Triton kernels serve this device and raise an error, after a write that a whole launch would repeat."""
    launch._warn_once.cache_clear()
    real, error = launch._implementation, KernelError("ptxas exploded", where="some kernel")

    def implementation(op, kind):
        def kernel(*args, **options):
            raise error

        return kernel if kind == "triton" else real(op, kind)

    monkeypatch.setattr(launch, "available", lambda device, kernels=None: ("triton", "pretended"))
    monkeypatch.setattr(launch, "_implementation", implementation)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_does_not_compile_gives_way_to_the_reference(op, request):
    with launch.serving("reference"):
        want, state = call(op)
    log = request.getfixturevalue("failing")
    for _ in range(2):
        got, after = call(op)
        assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(state, after))
    assert log.text.count(f"{op} runs the slow reference") == 1 and "ptxas exploded" in log.text


@pytest.mark.parametrize("op", OPS)
def test_it_is_an_error_under_strict_and_on_demand(op, failing, monkeypatch):
    with launch.strict(), pytest.raises(KernelError, match="ptxas exploded"):
        call(op)
    monkeypatch.setattr(launch, "_kernels", "triton")
    with pytest.raises(KernelError, match="ptxas exploded"):
        call(op)


@pytest.mark.parametrize("op", OPS)
def test_what_no_kernel_takes_is_no_failure(op, monkeypatch, caplog):
    """float64 has a reference only: that costs a warning even under strict."""
    launch._warn_once.cache_clear()
    monkeypatch.setattr(launch, "available", lambda device, kernels=None: ("triton", "pretended"))
    torch.set_default_dtype(torch.float64)
    try:
        with launch.strict():
            assert call(op)[0].dtype == torch.float64
        assert "dtypes" in caplog.text
        monkeypatch.setattr(launch, "_kernels", "triton")
        with pytest.raises(UnsupportedError, match="dtypes"):
            call(op)
    finally:
        torch.set_default_dtype(torch.float32)
