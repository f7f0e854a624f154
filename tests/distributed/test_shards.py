"""Numbers per head go to the processes that have the heads; a narrowed method remembers those of all."""

from __future__ import annotations

import pytest
import torch

from sparsify.distributed import shards
from sparsify.distributed.shards import Shard
from sparsify.ops.patterns import ALWAYS
from sparsify.passes.minference import MInference
from sparsify.passes.sink_window import SinkWindow
from sparsify.passes.xattention import XAttention


@pytest.mark.parametrize("size, local", [(2, 2), (4, 1), (1, 4)])
def test_each_process_takes_its_own(size, local):
    numbers = (1, 2, 3, 4)
    parts = [Shard(rank, size, "").own(numbers, local) for rank in range(size)]
    assert tuple(number for part in parts for number in part) == numbers


@pytest.mark.parametrize("numbers", [(0.5,), (0.5, 0.7), (1.0, 2.0, 3.0)])
def test_numbers_of_other_counts_stay(numbers):
    assert Shard(1, 2, "").own(numbers, 2) == numbers


def test_a_method_for_some_heads_is_configured_for_all():
    method = XAttention(threshold=(0.1, 0.2, 0.3, 0.4), windows=(0, 5, 0, 7))
    own = method.of_heads(Shard(1, 2, ""), 2)
    assert (own.threshold, own.windows) == ((0.3, 0.4), (0, 7))
    assert own.options() == method.options() and own.for_all_heads() is method
    assert own.selection()["threshold"] == (0.3, 1.0)
    assert own.keep_all().options() == method.keep_all().options()
    assert method.of_heads(Shard(1, 2, ""), 4) is method
    assert XAttention(threshold=0.5).of_heads(Shard(1, 2, ""), 2).threshold == 0.5


@pytest.mark.parametrize(
    "method",
    [
        XAttention(threshold=(0.1, 0.2, 0.3, 0.4)),
        XAttention(threshold=0.5, patterns=((), (128, 128), (), (0, 256))),
        MInference(columns=(128, 0, 256, 0), diagonals=128),
    ],
    ids=["thresholds", "patterns", "columns"],
)
def test_a_method_that_keeps_everything_takes_no_numbers_of_heads(method):
    """Else verification would read those of the layer in their place, and compare what is sparse with dense attention."""
    own = method.of_heads(Shard(1, 2, ""), 2)
    assert own.head_numbers() and own.keep_all().head_numbers() == method.keep_all().head_numbers() == {}
    assert own.keep_all() == method.keep_all()


def test_one_head_of_many_still_takes_its_threshold_as_an_operand():
    own = XAttention(threshold=(0.1, 0.2)).of_heads(Shard(1, 2, ""), 1)
    assert own.head_numbers() == {"threshold": (0.2,)}


def test_columns_and_diagonals_of_heads_are_operands_with_room_for_all_layers_of_a_kind():
    """Layers are of one kind by all heads: what this process's heads need in one of them says nothing of another."""
    layers = MInference(columns=(1024, 0, 0, 128), diagonals=128), MInference(columns=(0, 0, 512, 1024), diagonals=(0, 128, 0, 128))
    assert MInference.kind(layers[0].options()) == MInference.kind(layers[1].options())
    for rank, local in ((0, 2), (1, 2), (3, 1)):
        own = [layer.of_heads(Shard(rank, 4 // local, ""), local) for layer in layers]
        assert len({one._operand_room for one in own}) == 1 and all(one.most <= one._operand_room + ALWAYS for one in own)
        heads = slice(rank * local, (rank + 1) * local)
        assert [one.head_numbers() for one in own] == [
            {"columns": (8, 0, 0, 1)[heads], "diagonals": (1, 1, 1, 1)[heads]},
            {"columns": (0, 0, 4, 8)[heads], "diagonals": (0, 1, 0, 1)[heads]},
        ]


def test_windows_of_heads():
    assert SinkWindow(window=(4, 0, 8, 0)).of_heads(Shard(0, 2, ""), 2).windows == (4, 0)


def test_ordinary_tensors_are_whole():
    assert shards.find([torch.ones(2), torch.nn.Parameter(torch.ones(2)), None]) is None
