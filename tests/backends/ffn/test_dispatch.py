"""What serves the feed-forward ops when a kernel fails or does not take a call, and how many rows go where."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends import dispatch as launch
from sparsify.backends.ffn import few_rows as triton_ffn
from sparsify.backends.ffn import many_rows, reference
from sparsify.errors import KernelError
from sparsify.ops import feed_forward
from tests.passes.test_ffn_skip import CALL, weights


def call(rows: int = 3, **changes):
    x, w = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(0)), weights()
    remaining = torch.tensor([(0, 2, -1)[i % 3] for i in range(rows)], dtype=torch.int32)
    args = (x, x, remaining, w["up"], w["down"])
    named = {"gate": w["gate"], "norm_weight": w["norm_weight"], **CALL, **changes}
    return feed_forward.ffn(*args, **named), reference.ffn(*args, **named)


@pytest.fixture
def on_triton(monkeypatch):
    """Calls go to the Triton launcher, as they would on a GPU."""
    launch._warn_once.cache_clear()
    monkeypatch.setattr(launch, "available", lambda device: ("triton", "pretended"))


def explode(*args, **options):
    raise RuntimeError("ptxas exploded")


@pytest.mark.parametrize("rows, module, name", [(3, triton_ffn, "kernels"), (40, many_rows, "kernels")])
def test_a_kernel_that_fails_costs_a_warning_and_under_strict_raises(on_triton, monkeypatch, caplog, rows, module, name):
    monkeypatch.setattr(module, name, explode)
    for _ in range(2):
        (got, after), (want, want_after) = call(rows)
        assert torch.equal(got, want) and torch.equal(after, want_after)
    assert caplog.text.count("sparsify::ffn") == 1 and "ptxas exploded" in caplog.text and "runs the slow reference" in caplog.text
    with launch.strict(), pytest.raises(KernelError, match=r"8 to 16, gated silu.*ptxas exploded"):
        call(rows)
    monkeypatch.setattr(launch, "_kernels", "triton")
    with pytest.raises(KernelError, match="ptxas exploded"):
        call(rows)


def test_the_counters_kernel_that_fails(on_triton, monkeypatch, caplog):
    monkeypatch.setattr(triton_ffn, "_start_kernel", explode)
    like, start = torch.zeros(2, 1, 8), {"warmup": 0, "most": 4, "length": 4, "key": 5, "version": 1}
    feed_forward.forget_runs()
    made = [feed_forward.ffn_start(like, torch.tensor([[p]]), -1, **start).tolist() for p in (7, 8, 9)]
    assert made == [[0, 0], [1, 1], [2, 2]]
    assert "ptxas exploded" in caplog.text
    with launch.strict(), pytest.raises(KernelError, match="ptxas exploded"):
        feed_forward.ffn_start(like, torch.tensor([[10]]), -1, **start)


def test_a_call_that_no_kernel_takes_runs_the_reference_even_under_strict(on_triton, caplog):
    with launch.strict():
        (got, after), (want, want_after) = call(2, gate=weights()["gate"].t().contiguous().t())
    assert torch.equal(after, want_after) and torch.equal(got, want)
    assert "not contiguous" in caplog.text


def test_an_empty_batch(on_triton):
    (got, after), _ = call(0)
    assert got.shape == (0, 1, 8) and after.shape == (0,)


def test_nothing_to_count_needs_no_kernel(on_triton, monkeypatch):
    monkeypatch.setattr(triton_ffn, "_start_kernel", explode)
    like = torch.zeros(1, 5000, 8)  # more rows than the kernel has places
    for warmup, most, length, want in [(3, 2, 0, -1), (0, 2, 0, 2), (0, 2, 5, 0)]:
        start = {"warmup": warmup, "most": most, "length": length, "key": 5, "version": 1}
        for module in (triton_ffn, reference):
            assert module.ffn_start(like, None, -1, **start).unique().tolist() == [want]
