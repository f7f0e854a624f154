"""The running call of a SparseCache: which layer it is at, and how attention, which is given no cache, finds that layer from its keys."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CacheError


class MaskSizeGuard:
    """Returned instead of a SparseCache's mask sizes. Slots are not in order of position, so no mask can be built from sizes.

    Sparsify's attention does not use it. Any other code that computes with it gets a CacheError.
    """

    def _refuse(*args: Any, **kwargs: Any) -> Any:
        raise CacheError(
            "the model builds an ordinary attention mask for a SparseCache",
            hint="make the cache with SparseCache(model.config, ...) of this very model, after any set_attn_implementation; one that was "
            "loaded needs cache.attach(model.config)",
        )

    __torch_function__ = classmethod(_refuse)
    __add__ = __radd__ = __sub__ = __rsub__ = __index__ = __int__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


MASK_SIZE = MaskSizeGuard()


class CallState:
    """State of the running call, shared by all layers of a SparseCache. Kept on the host, so that reading it costs no synchronisation.

    pending: layer whose `update` has run and whose attention has not.
    storing: True between the first layer's attention and the last layer's: layers may hold different tokens.
    columns: tokens of the last call, padding included, where a policy awaits what is said of them and the host knows their number.
    broken: what changes layers outside of attention stopped halfway (`changing`).
    filled: slots that hold tokens in every row, head and layer before this call, within a graph that is given that number
        (`caches.filled`); None elsewhere.
    looked: so many slots were found to hold tokens, without a hole.
    """

    def __init__(self) -> None:
        self.pending: Any = None
        self.storing = False
        self.broken = False
        self.columns: int | None = None
        self.filled: int | None = None
        self.looked = 0

    def forget(self) -> None:
        self.pending, self.storing, self.broken, self.filled, self.looked = None, False, False, None, 0

    @contextlib.contextmanager
    def changing(self) -> Generator[None]:
        """Around whatever changes layers and is not attention: where it stops halfway (out of memory, an interrupt), the cache cannot be
        used until `forget`. Uncompiled code only."""
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    @property
    def idle(self) -> bool:
        return self.pending is None and not self.storing and not self.broken


# Attribute of the key tensor that names its layer between `update` and attention: transformers passes attention no cache, and an attribute
# of the call's own tensor is invisible to other threads' calls and ends with it.
_LAYER = "_sparsify_layer"


def layer_from_keys(key: Tensor) -> Any:
    """The layer whose `update` returned these keys; None for a call without a SparseCache.

    Raises:
        CacheError: attention has already used them.
    """
    layer = getattr(key, _LAYER, None)
    if layer is not None and layer.call.pending is not layer:
        raise CacheError("the keys of one call are attended to twice", where=f"layer {layer.index}", hint="use an ordinary cache")
    return layer


# Beside it: where the tokens of a packed call lie, `regions.packed.Layout.operands`.
_PACKED = "_sparsify_packed"


def mark(key: Tensor, layer: Any) -> None:
    """Names the layer whose `update` returns these keys."""
    setattr(key, _LAYER, layer)


def mark_packed(key: Tensor, layer: Any, packing: dict[str, Tensor]) -> None:
    """Names the layer of packed keys, whose `update` was given them as a padded batch."""
    mark(key, layer)
    setattr(key, _PACKED, packing)


def packing_from_keys(key: Tensor) -> dict[str, Tensor] | None:
    """Where the tokens of these keys lie; None where they lie as the caller gave them."""
    return getattr(key, _PACKED, None)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Dtype that autocast gives attention over this tensor; None without autocast, and for float64, which autocast leaves alone."""
    device = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def link_layers(layers: list[Any]) -> CallState:
    """Gives the layers of one cache a common CallState and marks the first and the last.

    The marks are flags rather than layer numbers, because compiled code specialises on every integer that it compares.
    """
    call = CallState()
    for layer in layers:
        layer.call, layer.is_first, layer.is_last = call, layer is layers[0], layer is layers[-1]
    return call
