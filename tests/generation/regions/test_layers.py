"""What stands for a decoder layer in code that serves all of them follows the layer."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import nn

from sparsify.generation.regions.layers import Shadow


class Turned(nn.Sequential):
    def forward(self, x):
        return -super().forward(x)


@torch.no_grad()
def test_modules_that_change_places_or_are_replaced_are_seen():
    layer: nn.Module = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=nn.Tanh(), third=nn.Linear(4, 4)))
    layer.layer_idx = 3
    shadow, x, results = Shadow(layer), torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), []

    def follows() -> None:
        results.append(layer.forward(x))
        assert shadow.current() is shadow.current() and torch.equal(shadow.current().forward(x), results[-1])

    follows()
    layer.first = layer._modules.pop("first")  # the last one now
    follows()
    layer.third = nn.Linear(4, 4, bias=False)
    follows()
    del layer.second
    follows()
    layer.first.weight = nn.Parameter(torch.eye(4))
    follows()
    layer.__class__ = Turned  # as parametrizations and sharding do
    follows()
    assert shadow.number == 3 and not any(torch.equal(one, other) for one, other in itertools.pairwise(results))
