"""The norm after the last layer is compiled where its copies in float32 would fill memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsify
from sparsify.costs.device import describe
from sparsify.generation.regions import long_rows, regional
from sparsify.generation.regions.long_rows import LongRows
from sparsify.planning.config.config import Config
from tests.support.harness import visible_error
from tests.support.tiny_models import build


@pytest.fixture
def small_memory(monkeypatch):
    """A device of which more than 64 numbers are too many."""
    device = dataclasses.replace(describe(torch.device("cpu")), memory=16 * 2 * 4 * 64)
    monkeypatch.setattr(long_rows.hardware, "describe", lambda _: device)


def norm() -> torch.nn.Module:
    return build("llama", layers=1).model.norm


def counted(module: torch.nn.Module, monkeypatch) -> tuple[LongRows, list[int]]:
    """The module's stand-in, and the rows that go to compiled code, which is eager here."""
    called: list[int] = []

    def compile_(forward, **options):
        return lambda rows: (called.append(rows.shape[1]), forward(rows))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    return LongRows(module, Config()), called


@torch.no_grad()
def test_long_inputs_alone_are_compiled(small_memory, monkeypatch):
    module = norm()
    stand_in, called = counted(module, monkeypatch)
    width = module.weight.shape[0]
    few, many = torch.randn(1, 64 // width, width), torch.randn(1, 64 // width + 1, width)
    for rows in (few, many):
        assert torch.equal(stand_in(rows), module(rows))
    assert called == [many.shape[1]]


def test_hooks_gradients_and_unknown_memory_leave_it_alone(small_memory, monkeypatch):
    module = norm()
    stand_in, called = counted(module, monkeypatch)
    rows = torch.randn(1, 100, module.weight.shape[0])
    stand_in(rows)  # with gradients
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        stand_in(rows)
        assert seen
        handle.remove()
        monkeypatch.setattr(long_rows.hardware, "describe", lambda _: dataclasses.replace(describe(torch.device("meta")), memory=None))
        stand_in(rows)
    assert not called


@torch.no_grad()
def test_one_that_cannot_be_compiled_runs_as_it_is(small_memory, monkeypatch):
    def fail(rows):
        raise torch._dynamo.exc.TorchDynamoException("no")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: fail)
    module = norm()
    stand_in = LongRows(module, Config())
    rows = torch.randn(1, 100, module.weight.shape[0])
    assert torch.equal(stand_in(rows), module(rows)) and stand_in._failed


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_regions_has_it_and_gives_it_back(small_memory, monkeypatch):
    model = build("llama", layers=1)
    ids = torch.arange(3, 23)[None]
    want = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    sparsify.compile(model, passes=["dense"], strict=True, lower="eager", progress=False)
    stand_in = model.model.norm._compiled_call_impl
    assert isinstance(stand_in, LongRows)
    stand_in.config = Config()
    got = model(ids, use_cache=False).logits
    assert stand_in._compiled is not None and visible_error(got, want) < 2e-5
    regional.remove(model)
    assert model.model.norm._compiled_call_impl is None
