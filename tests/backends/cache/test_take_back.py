"""The last tokens of all layers of a cache are taken back: in plain PyTorch, and by one launch in Triton's interpreter
(TRITON_INTERPRET=1)."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsify.backends.cache import take_back
from sparsify.backends.codegen import source
from sparsify.errors import UnsupportedError
from sparsify.ops.taking_back import Counters, Places


def held(heads=(2, 3, 2), capacities=(40, 40, 64), tokens=(30, 17), left_out=(0, 0, 1)):
    """Layers of several sizes whose row b holds tokens[b] tokens, of a text with padding, but those that a layer was not given."""
    layers = []
    for kv_heads, capacity, gone in zip(heads, capacities, left_out, strict=True):
        at = torch.arange(capacity, dtype=torch.int32).repeat(len(tokens), kv_heads, 1)
        seen = torch.tensor(tokens, dtype=torch.int32) - gone
        positions = torch.where(at < seen[:, None, None], at, -1)
        layers.append(Counters(positions, seen[:, None].repeat(1, kv_heads), seen, torch.tensor(33)))
    return layers


def check(serve, gone, most):
    layers, before = held(), held()
    serve(torch.tensor(gone), layers, most, Places())
    for layer, old in zip(layers, before, strict=True):
        left = old.seen - gone
        assert torch.equal(layer.seen, left) and int(layer.length) == 33 - gone
        assert torch.equal(layer.counts, left[:, None].expand_as(old.counts))
        assert torch.equal(layer.positions, old.positions.masked_fill(old.positions >= left[:, None, None], -1))


@pytest.mark.parametrize("gone, most", [(0, 5), (3, 5), (5, 5), (15, 15), (1, 1)])
def test_reference(gone, most):
    check(take_back.reference, gone, most)


@pytest.mark.interpreter
@pytest.mark.parametrize("gone, most", [(0, 5), (3, 5), (15, 15), (1, 1)])
def test_one_launch(gone, most):
    check(take_back.by_kernel, gone, most)


def test_what_no_launch_reads_is_left_to_the_reference():
    layers = held()
    strided = Counters(layers[1].positions.transpose(0, 1).contiguous().transpose(0, 1), *layers[1].tensors[1:])
    with pytest.raises(UnsupportedError, match="strided"):
        take_back.by_kernel(torch.tensor(1), [layers[0], strided], 1, Places())


def test_places_are_those_of_the_buffers():
    layers, places = held(), Places()
    table = places.of(layers)
    assert places.of(layers) is table and table.view(3, -1)[:, 4:].tolist() == [[2, 40], [3, 40], [2, 64]]
    assert table.view(3, -1)[:, :4].tolist() == [[t.data_ptr() for t in layer.tensors] for layer in layers]
    others = held()
    assert not torch.equal(places.of(others), table), "buffers that have moved"
    assert copy.deepcopy(places)._table is None


def test_it_compiles_for_a_gpu():
    pytest.importorskip("triton")
    from tests.support.offline import compile_kernel

    kernel = source.load(take_back.take_back_source(8, 15), "take_back").take_back
    assert compile_kernel(kernel, take_back.arguments(), arch=90, num_warps=1, num_stages=1).spilled == 0
