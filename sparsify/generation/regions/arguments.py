"""What a layer is called with, taken apart into what a region is given: its cache's layer, its masks, and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.generation.regions import caches, left_out, masks
from sparsify.generation.regions.caches import LayerCall, LayerView
from sparsify.generation.regions.layers import Layer, NotShared
from sparsify.generation.regions.masks import PostponedMask
from sparsify.generation.regions.packed import Layout, PaddedRows

_UNKNOWN = "its layers are called in a form that is not known"


class Arguments:
    """Arguments of one call of a layer.

    hidden: [batch, query_len, width]; a tower's may be [query_len, width].
    by_position: what remains of those that are given by position: `hidden`, or nothing.
    rest: arguments by name, without caches and masks that are put off.
    names: the arguments by which the layer takes its cache.
    cache: of one layer; None without a cache.
    plans, varying: how to make the masks that are put off, and what varies of each, by argument.

    Raises:
        NotShared: no region can be called so.
    """

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], known: caches.Known, layout: Layout | None = None):
        """known: the caches of the model's call. layout: where the call's tokens lie, if they are packed."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if type(hidden) is not Tensor or len(args) > len(layer.arguments):
            raise NotShared(_UNKNOWN)
        if hidden.dim() != 3 and not (layer.tower and hidden.dim() == 2):
            raise NotShared(_UNKNOWN)
        self.hidden, self.by_position, self.layout = hidden, args[:1], layout
        self.batch, self.query_len = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.shape[0])
        rest = {**dict(zip(layer.arguments[1:], args[1:], strict=False)), **kwargs} if len(args) > 1 else dict(kwargs)
        self.cache: LayerCall[Any] | None = None
        self.names = tuple(name for name in caches.CACHES if rest.get(name) is not None)
        for name in self.names:
            cache = rest.pop(name)
            if why := known.trouble(cache, layer.shadow.number):
                raise NotShared(why)
            self.cache = caches.layer_call(cache, layer.shadow.number, self.query_len if layout is None else layout.columns)
        self.key_len = 0 if self.cache is None else self.cache.key_len
        if self.cache is not None and self.key_len:
            rest = left_out.own_masks(rest, layer.arguments, self.cache.layer, hidden)
        held_by = left_out.as_held(self.cache.layer) if self.cache is not None and layout is None else None
        self.plans: dict[str, masks.Plan] = {}
        self.varying: dict[str, dict[str, Any]] = {}
        self._recipes: list[Any] = []
        for name, value in [*rest.items()]:
            if isinstance(value, PostponedMask):
                recipe = rest.pop(name).recipe
                self.plans[name], self.varying[name] = masks.plan(recipe, hidden, held_by)
                self._recipes.append((name, recipe.form, self.plans[name].form()))
        self.rest = rest

    def form(self) -> Any:
        """What tells graphs apart, beside the layer's kind and the sizes.

        Raises:
            NotShared: an object that layers may hand on to each other.
        """
        hidden = self.hidden
        return (
            self.names,
            tuple(map(_form, self.by_position)),
            tuple((name, _form(value)) for name, value in self.rest.items()),
            tuple(self._recipes),
            self.cache and self.cache.kind(),
            (self.batch == 1, self.query_len == 1, hidden.dtype, hidden.device),
            self.layout and self.layout.batch == 1,
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hidden.requires_grad),
        )

    def handed_back(self, value: Any) -> Any:
        """A layer's result, with the whole cache where it gives back the one that it was given."""
        if self.cache is None:
            return value
        if type(value) is tuple:
            return tuple(map(self.handed_back, value))
        return self.cache.cache if isinstance(value, LayerView) else value


_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))


def _form(value: Any) -> Any:
    """What of an argument tells graphs apart, beside the sizes of tensors.

    Raises:
        NotShared: an object that layers may hand on to each other.
    """
    if type(value) in (Tensor, nn.Parameter):
        return value.dim(), value.dtype
    if isinstance(value, _SIMPLE):
        return value if isinstance(value, bool | str) else type(value)
    if type(value) in (tuple, list):
        return type(value), tuple(map(_form, value))
    raise NotShared(f"its layers are given a {type(value).__name__}")


def made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with packed rows as the padded batch."""
    make = lambda value: value.make() if isinstance(value, PaddedRows) else value
    return tuple(map(make, args)), {name: make(value) for name, value in kwargs.items()}


def uncompiled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's result, as it is; its hooks are the caller's."""
    return module.forward(*map(masks.real, args), **{name: masks.real(value) for name, value in kwargs.items()})
