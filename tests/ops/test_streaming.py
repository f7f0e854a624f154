"""What two stages cannot serve, asked of a call and of a site in the same words."""

from __future__ import annotations

import pytest
import torch

from sparsify.ops import streaming
from sparsify.ops.selection import SelectCall
from sparsify.ops.streaming import obstacles

NONE = {"padding": False, "documents": False, "windows": False, "shared": False}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, ()),
        ({"padding": True}, ("beside padding",)),
        ({"documents": True, "windows": True}, ("beside packed documents", "beside a window")),
        ({"shared": True}, ("of an estimate that a group shares",)),
        ({"listed_cells": 8}, ("of 8 cells of a query block",)),
        ({"listed_cells": 16, "key_blocks": 8192}, ()),
        ({"key_blocks": 8193}, ("over rows of 8193 blocks",)),
        ({"key_blocks": 5, "widest": 4}, ("over rows of 5 blocks",)),
    ],
)
def test_obstacles(changes, words):
    assert obstacles(**{**NONE, **changes}) == words


FLAGS = torch.ones(1, 512, dtype=torch.uint8)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, ()),
        ({"key_flags": FLAGS}, ("beside padding",)),
        ({"segments": FLAGS.int()}, ("beside packed documents",)),
        ({"windows": (0, 40)}, ("beside a window",)),
        ({"windows": (0, 0)}, ()),
        ({"estimate": "group"}, ("of an estimate that a group shares",)),
        ({"estimate": "half", "block_size": 64}, ("of 8 cells of a query block",)),
    ],
)
def test_a_call_answers_as_its_site_does(changes, words):
    query, key = torch.empty(1, 2, 512, 16), torch.empty(1, 1, 512, 16)
    options = {"pool": "row", "stride": 8, "refine_stride": 4, "threshold": [0.5], "coarse_threshold": 0.9, **changes}
    call = SelectCall.bind(query, key, scale=1.0, causal=True, **options)
    assert call.stages[1].unstreamed(listed=True) == words


def test_rows_that_are_too_long_have_one_stage(monkeypatch):
    query, key = torch.empty(1, 2, 512, 16), torch.empty(1, 1, 512, 16)
    call = SelectCall.bind(query, key, scale=1.0, causal=True, pool="row", stride=8, refine_stride=4, threshold=[0.5])
    assert call.served is call
    monkeypatch.setattr(streaming, "WIDEST_ROW", 3)
    alone = call.served
    assert (alone.stride, alone.refine_stride) == (4, 0) and alone.served is alone
    assert call.unstreamed(listed=False) == ("over rows of 4 blocks",) and not call.unstreamed(listed=False, widest=4)
