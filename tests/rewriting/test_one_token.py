"""Decode steps that are told how many slots are filled, as torch's own operations: the op's outputs and its state, for any number."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from sparsify.ops import cache
from sparsify.ops.cache import CacheDecodeCall
from sparsify.rewriting import one_token
from tests.backends.cache.test_one_token import CAPACITY, make

STATE = ("keys", "values", "positions", "counts", "seen", "length")
ANYWHERE = lambda device: True


def captured(call, told, serves=ANYWHERE):
    """A step that is compiled with the numbers of `told` rows for an operand, what each of its graphs had replaced, and the graphs."""
    replaced, graphs = [], []

    def backend(gm, example_inputs):
        found = one_token.finds_any(gm.graph, serves)
        replaced.append(one_token.write_out(gm, serves))
        assert found == bool(replaced[-1])
        graphs.append(gm)
        return gm.forward

    @functools.partial(torch.compile, backend=backend, fullgraph=True)
    def step(args, kwargs, rows):
        return cache.decode(*args, **kwargs, filled=None if rows is None else rows.shape[0])

    torch._dynamo.reset()
    if told is not None:
        torch._dynamo.mark_dynamic(told, 0)
    return lambda call, rows: step(*call.arguments(), rows), replaced, graphs


def rows(count):
    return torch.empty(count, 0)


@pytest.mark.parametrize("heads", [2, 4])
@torch.no_grad()
def test_one_graph_for_all_numbers(heads):
    call = make(stored=3, heads=heads)
    other = dataclasses.replace(call, **{name: getattr(call, name).clone() for name in STATE})
    run, replaced, graphs = captured(call, told := rows(3))
    for count in range(3, CAPACITY):
        got, wanted = run(call, told if count == 3 else rows(count)), other.run()
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6)
        assert got.transpose(1, 2).is_contiguous() and wanted.transpose(1, 2).is_contiguous()
        for name in STATE:
            assert torch.equal(getattr(call, name).nan_to_num(), getattr(other, name).nan_to_num()), name
    assert replaced == [1]
    assert not any(node.target is cache.decode for node in graphs[0].graph.nodes)


OTHERS = {
    "softcap": {"softcap": 5.0},
    "window": {"window": 2},
    "sink_logits": {"sink_logits": torch.zeros(4)},
    "is_token": {"is_token": torch.tensor([[True], [False]])},
    "ring": {"pinned": 2},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_steps_that_stay_calls(changes):
    call = make(**changes)
    other = dataclasses.replace(call, **{name: getattr(call, name).clone() for name in STATE})
    run, replaced, _ = captured(call, told := rows(4))
    torch.testing.assert_close(run(call, told), other.run())
    assert replaced == [0] and int(call.length) == int(other.length) == 5


@torch.no_grad()
def test_nobody_told_and_another_device():
    run, replaced, _ = captured(make(), None)
    run(make(), None)
    other, served_elsewhere, _ = captured(make(), told := rows(4), lambda device: device.type == "cuda")
    other(make(), told)
    assert replaced == served_elsewhere == [0]


def test_the_number_says_nothing_new_to_kernels():
    """The op computes the same whether it is told the number or not, and no kernel has to know the argument."""
    call, other = make(), make()
    torch.testing.assert_close(dataclasses.replace(call, filled=4).run(), other.run())
    assert dataclasses.replace(call, filled=4).beyond(()) == call.beyond(()) == []
    assert CacheDecodeCall.schema().count("SymInt? filled=None") == cache.CacheStoreCall.schema().count("SymInt? filled=None") == 1
