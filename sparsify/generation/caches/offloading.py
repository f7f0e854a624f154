"""Keys and values in the host's memory, from where each layer's come to the device for its call, while the layer before it computes.

Two places on the device serve all layers in turn: a layer's `keys` and `values` are views of one of them, whose contents are the layer's
only between `bring` and `put_back`. The other place receives those of the next layer on a stream of its own. What a call has written is
copied back: the slots of new tokens, or everything where a policy has moved them. Positions, counts and bounds stay on the device, and of
keys and values in few bits the scales and the tokens that lie as they came: what is copied back then are groups that became codes.

On a CPU the same copies are made, one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import UnsupportedError
from sparsify.ops.pages import Pages
from sparsify.ops.quantised import GROUP
from sparsify.policies import Policy

# a `layer.SparseLayer`, whose module uses this one
SparseLayer = Any
_NAMES = ("keys", "values")
# slots of a ring that are copied back one by one; beyond that everything is
_FEW = 64


def check_offloading(policy: Policy, draft: Pages | None) -> None:
    """Raises UnsupportedError for what does not go together with keys in the host's memory."""
    reasons = {
        f"{policy.name} packs slots by head, which are moved by head": policy.by_head,
        "every drafted token would bring all keys to the device": draft is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(reason, where="offloading", hint="leave one of them out")


@dataclass
class Rest:
    """What lies in the host's memory of one layer.

    tensors: pinned where there is a GPU, by name, as the layer's buffers.
    place: which of the two places on the device the layer uses.
    low, high: least and largest of the layer's counts.
    """

    tensors: dict[str, Tensor]
    place: int
    low: int
    high: int


class Offloader:
    """The places on the device of one cache's layers, and the copies to and from them.

    Args:
        numbers: of the layers that are offloaded, in their order.
    """

    def __init__(self, numbers: Sequence[int]):
        self.numbers = tuple(numbers)
        self._clear()

    def _clear(self) -> None:
        self.layers: dict[int, SparseLayer] = {}
        self.places: list[dict[str, Tensor]] = [{}, {}]
        self.resident: list[SparseLayer | None] = [None, None]
        self.stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.numbers = state["numbers"]
        self._clear()

    def bytes(self) -> int:
        """Of keys and values on the device."""
        return sum(t.numel() * t.element_size() for place in self.places for t in place.values())

    def host_bytes(self) -> int:
        """Of keys and values in the host's memory."""
        rests = [layer.rest for layer in self.layers.values() if layer.rest is not None]
        return sum(t.numel() * t.element_size() for rest in rests for t in rest.tensors.values())

    def take(self, layer: SparseLayer) -> None:
        """Moves a layer's keys and values, which lie on the device, to the host's memory."""
        self.wait()
        cuda = torch.device(layer.device).type == "cuda"
        tensors = {}
        for name in _NAMES:
            held: Tensor = getattr(layer, name)
            tensors[name] = torch.empty(held.shape, dtype=held.dtype, pin_memory=cuda)
            tensors[name].copy_(held)
        if cuda and self.stream is None:
            self.stream = torch.cuda.Stream(layer.device)
        layer.rest = Rest(tensors, self.numbers.index(layer.index) % 2, *_ends(layer))
        self.layers[layer.index] = layer
        self._place(layer)

    def _place(self, layer: SparseLayer) -> None:
        """Makes the layer's buffers views of its place, which is made larger where it is too small."""
        rest, grown = layer.rest, False
        place = self.places[rest.place]
        for name, held in rest.tensors.items():
            if name not in place or place[name].numel() < held.numel() or place[name].dtype != held.dtype:
                place[name] = torch.zeros(held.numel(), dtype=held.dtype, device=layer.device)
                grown = True
        self.resident[rest.place] = None
        for other in self.layers.values() if grown else [layer]:
            if other.rest is not None and other.rest.place == rest.place:
                for name, held in other.rest.tensors.items():
                    setattr(other, name, place[name][: held.numel()].view(held.shape))
                other.mark_static()

    def grow(self, layer: SparseLayer, capacity: int) -> None:
        """Gives a layer of which nothing is evicted more slots."""
        self.wait()
        rest = layer.rest
        for name, held in rest.tensors.items():
            longer = torch.zeros(*held.shape[:2], capacity, held.shape[3], dtype=held.dtype, pin_memory=held.is_pinned())
            longer[:, :, : held.shape[2]].copy_(held)
            rest.tensors[name] = longer
        self._place(layer)

    def refilled(self, layer: SparseLayer) -> None:
        """The host's memory and the layer's counts were written by something else than a call."""
        layer.rest.low, layer.rest.high = _ends(layer)
        self.resident[layer.rest.place] = None

    def wait(self) -> None:
        """Until the host's memory holds what was copied back to it."""
        if self.stream is not None:
            self.stream.synchronize()

    def bring(self, layer: SparseLayer) -> None:
        """Before a layer's call: its keys and values are in their place. Begins to copy those of the next layer."""
        self._copy_in(layer)
        if self.stream is not None:
            torch.cuda.current_stream(layer.device).wait_stream(self.stream)
        at = self.numbers.index(layer.index)
        following = self.layers.get(self.numbers[(at + 1) % len(self.numbers)])
        if following is not None and following.rest is not None and following.rest.place != layer.rest.place and following.started:
            self._copy_in(following)

    def _copy_in(self, layer: SparseLayer) -> None:
        rest = layer.rest
        if self.resident[rest.place] is layer:
            return
        with self._beside(layer):
            for name, held in rest.tensors.items():
                # beyond what is filled a layer that grows may hold anything
                _copy(getattr(layer, name), held, 0, min(rest.high, held.shape[2]) if layer.grows else held.shape[2])
        self.resident[rest.place] = layer

    def put_back(self, layer: SparseLayer, tokens: int, counted: bool) -> None:
        """After a layer's call: what it has written goes to the host's memory.

        Args:
            tokens: columns of the call; 0: anything may have changed.
            counted: every row had `tokens` tokens, so that the device need not be asked.
        """
        rest = layer.rest
        before = rest.low, rest.high
        if counted and tokens:
            rest.low, rest.high = rest.low + tokens, rest.high + tokens
        else:
            rest.low, rest.high = _ends(layer)
        parts = self._changed(layer, tokens, before)
        with self._beside(layer):
            for name, held in rest.tensors.items():
                for first, end in parts:
                    _copy(held, getattr(layer, name), first, end)

    def _changed(self, layer: SparseLayer, tokens: int, before: tuple[int, int]) -> list[tuple[int, int]]:
        """Slots that a call of so many tokens may have written, as ranges."""
        capacity, (low, high) = layer.keys.shape[2], before
        pinned = layer.layout.pinned
        if layer.codes and tokens == 1 and high - low < _FEW:
            return _closed(low, high, capacity, pinned)
        if layer.codes and layer.grows and tokens:
            # a group whose last slot was taken by the token before becomes codes now
            return [(min(max(low - 1, 0) // GROUP * GROUP, capacity - 1), min(layer.rest.high, capacity))]
        if layer.codes:
            return [(0, capacity)]
        if (layer.grows and tokens) or (pinned < 0 and tokens == 1):  # slot n holds token n
            return [(min(low, capacity - 1), min(layer.rest.high, capacity))]
        if tokens == 1 and pinned >= 0 and high - low < _FEW:
            counts = range(low, high + 1)
            slots = {count if count < pinned else pinned + (count - pinned) % max(capacity - pinned, 1) for count in counts}
            return [(slot, slot + 1) for slot in sorted(slots)]
        return [(0, capacity)]

    def forget(self, layer: SparseLayer) -> None:
        """A call failed: what lies in the place is nobody's."""
        self.resident[layer.rest.place] = None

    def _beside(self, layer: SparseLayer) -> contextlib.AbstractContextManager[Any]:
        """The stream of copies, which waits for what was computed so far."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(layer.device))
        return torch.cuda.stream(self.stream)


def _ends(layer: SparseLayer) -> tuple[int, int]:
    """Least and largest of a layer's counts; waits for the device."""
    if not layer.counts.numel():
        return 0, 0
    low, high = (int(end) for end in layer.counts.aminmax())
    return low, min(high, layer.keys.shape[2]) if layer.grows else high


def _closed(low: int, high: int, capacity: int, pinned: int) -> list[tuple[int, int]]:
    """Groups of slots that may have become codes when a token was stored in heads that held `low` to `high` tokens: those whose last slot
    was taken by the token before."""
    found: set[int] = set()
    for count in range(max(low - 1, 0), high):
        slot = min(count, capacity - 1) if pinned < 0 or count < pinned else pinned + (count - pinned) % max(capacity - pinned, 1)
        if slot % GROUP == GROUP - 1 or slot == capacity - 1:
            found.add(slot // GROUP)
    return [(group * GROUP, min((group + 1) * GROUP, capacity)) for group in sorted(found)]


def _copy(to: Tensor, source: Tensor, first: int, end: int) -> None:
    """Slots of [batch, kv_heads, capacity, dim]: runs of one head at a time, since only what is contiguous is copied without waiting."""
    if first >= end:
        return
    if (first, end) == (0, to.shape[2]):
        to.copy_(source, non_blocking=True)
        return
    for row, other in zip(to.flatten(0, 1), source.flatten(0, 1), strict=True):
        row[first:end].copy_(other[first:end], non_blocking=True)
