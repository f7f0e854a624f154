"""Takes the last tokens out of all layers of a cache from which nothing is evicted, without waiting for the device: slot n holds a layer's
token n, in all heads alike, so that positions of a few slots and three counts are all that changes. By one launch for all layers, and
in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, parameters, pointers
from sparsify.backends.codegen.launch import launch, launching, need, power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.ops.taking_back import Counters, Places

_WHERE = "take_back"

TEXT = '''\
@triton.jit
def take_back(
    ${parameters},
):
    """One program takes the last tokens out of one batch row of one layer, whose buffers lie where `places` says."""
    layer = tl.program_id(0)
    batch = tl.program_id(1)
    place = places + layer * ${width}
    positions = tl.load(place).to(tl.pointer_type(tl.int32))
    counts = tl.load(place + 1).to(tl.pointer_type(tl.int32))
    seen = tl.load(place + 2).to(tl.pointer_type(tl.int32))
    length = tl.load(place + 3).to(tl.pointer_type(tl.int64))
    kv_heads = tl.load(place + 4)
    capacity = tl.load(place + 5)
    gone = tl.load(tokens)
    left = (tl.load(seen + batch) - gone).to(tl.int32)
    heads = tl.arange(0, HEADS)
    steps = tl.arange(0, MOST)
    inside = heads < kv_heads
    slot = left + steps
    hidden = (steps < gone) & (slot >= 0) & (slot < capacity)
    rows = (batch * kv_heads + heads) * capacity
    # attention of several tokens goes by positions; what keys and values hold there is nobody's
    tl.store(positions + rows[:, None] + slot[None, :], -1, mask=inside[:, None] & hidden[None, :])
    held = counts + batch * kv_heads + heads
    tl.store(held, (tl.load(held, mask=inside, other=0) - gone).to(tl.int32), mask=inside)
    tl.store(seen + batch, left)
    if batch == 0:
        tl.store(length, tl.load(length) - gone)
'''


def arguments() -> tuple[Argument, ...]:
    """The kernel's arguments, in order."""
    return tuple(pointers("i64", "tokens", "places"))


def take_back_source(heads: int, most: int) -> str:
    """Module text with `take_back` (grid: layers, batch). heads: KV heads of the layer that has most. most: tokens that go at most."""
    constants = {"HEADS": power_of_two(heads), "MOST": power_of_two(most)}
    text = render(TEXT, {"parameters": parameters(arguments()), "width": Places.WIDTH})
    return "\n\n".join([header("The last tokens of all layers are taken back", constants), text])


@functools.lru_cache(maxsize=64)
def _module(heads: int, most: int) -> ModuleType:
    return source.load(take_back_source(heads, most), "take_back")


def by_kernel(tokens: Tensor, layers: Sequence[Counters], most: int, places: Places) -> None:
    """As `reference`, by one launch.

    Args:
        places: of the cache that the layers belong to.

    Raises:
        UnsupportedError: the layers lie on several devices, or their buffers are not what a launch reads.
        KernelError: the kernel could not be compiled or launched.
    """
    dtypes = (torch.int32, torch.int32, torch.int32, torch.int64)
    for layer in layers:
        need(
            all(t.device == tokens.device and t.is_contiguous() and t.dtype == d for t, d in zip(layer.tensors, dtypes, strict=True)),
            "counters on several devices, or strided",
            _WHERE,
        )
    heads, batch = max(layer.positions.shape[1] for layer in layers), layers[0].seen.shape[0]
    with launching(tokens.device, lambda: f"kernel that takes back up to {most} tokens of {heads} KV heads"):
        given = {"tokens": tokens, "places": places.of(layers)}
        launch(_module(heads, most).take_back, (len(layers), batch), arguments(), given, num_warps=1, num_stages=1)


def reference(tokens: Tensor, layers: Sequence[Counters], most: int, places: Places) -> None:
    """Takes back the last tokens of every row, which are none of its first.

    Args:
        tokens: how many, int64 [].
        layers: counters of all layers, each of as many rows.
        most: that they are at most.
        places: of no use here.
    """
    step = torch.arange(most, device=layers[0].seen.device, dtype=layers[0].seen.dtype)
    for layer in layers:  # some may have been given fewer tokens of the text than others
        slot = (layer.seen[:, None] - 1 - step).clamp(min=0)
        left = torch.where(step < tokens, -1, slot)[:, None]
        shape = (-1, layer.positions.shape[1], -1)
        layer.positions.scatter_(2, slot[:, None].expand(shape).long(), left.expand(shape).to(layer.positions.dtype))
        for count in (layer.counts, layer.seen, layer.length):
            count.sub_(tokens)
