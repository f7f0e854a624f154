"""Numbers per head go to the processes that have the heads; a narrowed method remembers those of all."""

from __future__ import annotations

import pytest
import torch

from sparsify.distributed import shards
from sparsify.distributed.shards import Shard
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
    assert own.keep_all().options() == method.options()
    assert method.of_heads(Shard(1, 2, ""), 4) is method
    assert XAttention(threshold=0.5).of_heads(Shard(1, 2, ""), 2).threshold == 0.5


def test_one_head_of_many_still_takes_its_threshold_as_an_operand():
    own = XAttention(threshold=(0.1, 0.2)).of_heads(Shard(1, 2, ""), 1)
    assert own.head_numbers() == {"threshold": (0.2,)}


def test_windows_of_heads():
    assert SinkWindow(window=(4, 0, 8, 0)).of_heads(Shard(0, 2, ""), 2).windows == (4, 0)


def test_ordinary_tensors_are_whole():
    assert shards.find([torch.ones(2), torch.nn.Parameter(torch.ones(2)), None]) is None
