"""A model's decoder layers, and a stand-in for each of them in code that serves all layers of a kind.

A layer's attention has a number, and compiled code is specialised on it. A shadow is a copy of the few modules that lead to this number,
over the same parameters, buffers and other modules, in which every number is replaced by `caches.LAYER`. Modules that tensor parallelism
divides have in it what `tensor_parallel.local` makes of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsify.generation import compat
from sparsify.generation.regions import tensor_parallel
from sparsify.generation.regions.caches import LAYER

NUMBER = "layer_idx"


class NotShared(Exception):
    """The layers of a model, or of one call of it, do not share regions; the message is the reason in a clause.

    lasting: whether the reason holds for later calls too.
    """

    def __init__(self, reason: str, lasting: bool = False):
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Layer:
    """A decoder layer, or one of a tower beside the decoder.

    path: from the model, such as `model.layers.3`.
    number: its index.
    module: the layer itself.
    shadow: what stands for it, made anew when the layer has changed.
    arguments: names of its forward's parameters that may be given by position.
    tower: whether it is one of a tower, an encoder that makes features of images or sound for the decoder.
    over_documents: what stands for a layer of a tower in calls over several texts; None for other layers.
    """

    path: str
    number: int
    module: nn.Module
    shadow: Shadow
    arguments: tuple[str, ...]
    tower: bool = False
    over_documents: Shadow | None = None

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, also those that are given by position."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


def find_layers(model: nn.Module) -> list[Layer]:
    """The decoder layers of a model.

    Raises:
        NotShared: there are none that are numbered one after the other, or more than one list of them.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and _numbered(module)]
    if len(lists) != 1:
        raise NotShared("it has no list of numbered decoder layers" if not lists else "it has several lists of numbered layers")
    name, modules = lists[0]
    if len(set(map(id, modules))) != len(modules):
        raise NotShared("some of its layers are one module")
    for number, module in enumerate(modules):
        found = {getattr(part, NUMBER) for part in module.modules() if NUMBER in vars(part)}
        if found != {number}:
            raise NotShared(f"layer {number} has the number {', '.join(map(str, sorted(found, key=str)))}")
    return [Layer(f"{name}.{number}", number, module, Shadow(module), _arguments(module)) for number, module in enumerate(modules)]


def find_towers(model: nn.Module, decoder: Sequence[Layer], told: Callable[[Any], Any]) -> list[Layer]:
    """The layers of all towers beside the decoder: lists of modules of one class, without numbers, whose attention is not causal and goes
    through transformers' AttentionInterface. told: as of `Shadow`, in calls over several texts."""
    taken = {id(part) for layer in decoder for part in layer.module.modules()}
    found: list[Layer] = []
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or not len(modules) or id(modules) in taken:
            continue
        if len({type(module) for module in modules}) == 1 and len(set(map(id, modules))) == len(modules) and all(map(_is_encoder, modules)):
            taken |= {id(part) for part in modules.modules()}
            for number, module in enumerate(modules):
                shadow, over_documents = Shadow(module, numbered=False), Shadow(module, numbered=False, told=told)
                found.append(Layer(f"{name}.{number}", number, module, shadow, _arguments(module), True, over_documents))
    return found


def _is_encoder(layer: nn.Module) -> bool:
    parts = [vars(part) for part in layer.modules()]
    attends = [part for part in parts if _attends_to_both_sides(part)]
    return len(attends) == 1 and attends[0]["config"]._attn_implementation == "sdpa" and not any(NUMBER in part for part in parts)


def _attends_to_both_sides(values: dict[str, Any]) -> bool:
    """Whether a module with these attributes is attention that is not causal, through transformers' AttentionInterface."""
    return values.get("is_causal") is False and hasattr(values.get("config"), "_attn_implementation")


def _arguments(layer: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(layer.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _numbered(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(any(isinstance(vars(m).get(NUMBER), int) for m in layer.modules()) for layer in modules)


class Shadow:
    """Makes the module that stands for a layer.

    number: the layer's own, known after `current()`.

    Args:
        numbered: whether the layer has a number.
        told: from the configuration of attention that is not causal to the one that it has here; None: its own.
    """

    def __init__(self, layer: nn.Module, numbered: bool = True, told: Callable[[Any], Any] | None = None):
        self._layer, self._numbered, self._told = layer, numbered, told
        self._copied: list[tuple[nn.Module, _Seen]] = []
        self._module: nn.Module | None = None
        self.number = -1

    def current(self) -> nn.Module:
        """The module to call, over what the layer holds at the moment.

        Raises:
            NotShared: the layer has no number any more, or several.
        """
        if self._module is None or not all(seen.is_still(module) for module, seen in self._copied):
            self._copied = []
            self._module = self._copy(self._layer, top=True)
            numbers = {vars(module)[NUMBER] for module, _ in self._copied if NUMBER in vars(module)}
            if len(numbers) != self._numbered:
                raise NotShared("a layer's number changed")
            self.number = next(iter(numbers), -1)
        return self._module

    def _copy(self, module: nn.Module, top: bool = False) -> nn.Module:
        if tensor_parallel.is_divided(module):
            self._copied.append((module, _Seen(module)))
            return tensor_parallel.local(module)
        if not top and not any(map(self._is_own, module.modules())):
            return module
        self._copied.append((module, _Seen(module)))
        twin = object.__new__(type(module))
        twin.__dict__.update(vars(module))
        twin.__dict__["_modules"] = {name: child if child is None else self._copy(child) for name, child in module._modules.items()}
        twin.__dict__["_forward_hooks"] = compat.without_recorders(module._forward_hooks)
        twin.__dict__.pop("_compiled_call_impl", None)
        if NUMBER in twin.__dict__:
            twin.__dict__[NUMBER] = LAYER
        if self._told is not None and _attends_to_both_sides(vars(module)):
            twin.__dict__["config"] = self._told(vars(module)["config"])
        return twin

    def _is_own(self, part: nn.Module) -> bool:
        """Whether a module is not the same in what stands for the layer."""
        recorded = compat.without_recorders(part._forward_hooks) is not part._forward_hooks
        told = self._told is not None and _attends_to_both_sides(vars(part))
        return NUMBER in vars(part) or recorded or told or tensor_parallel.is_divided(part)


class _Seen:
    """What a copy of a module has taken over, to be compared later, at every call: by identity, since tensors are compared by element."""

    def __init__(self, module: nn.Module):
        values = vars(module)
        self.kind, self.names, self.values = type(module), [*values], [*values.values()]
        self.modules, self.hooks = [*module._modules.items()], [*module._forward_hooks]
        self.parameters = [*module._parameters.values()] if "forward" in values else None

    def is_still(self, module: nn.Module) -> bool:
        """Whether the module holds the same objects."""
        values = vars(module)
        if (
            type(module) is not self.kind
            or len(values) != len(self.names)
            or not all(map(operator.is_, values.values(), self.values))
            or [*values] != self.names
        ):
            return False
        if [*values["_modules"].items()] != self.modules or [*values["_forward_hooks"]] != self.hooks:
            return False
        if self.parameters is None:
            return True
        found = values["_parameters"].values()
        return len(found) == len(self.parameters) and all(map(operator.is_, found, self.parameters))


class Watch:
    """Looks for changes to layers that a region would miss, or would take over for one layer only: hooks, replaced forwards."""

    def __init__(self, layers: list[Layer]):
        self._layers = layers
        self._divided: dict[int, Any] = {}  # forwards that tensor parallelism put there and that shadows know, by id
        self._take_note()

    def look_again(self) -> None:
        """Takes note of the modules that the layers have now."""
        if not all(values["_modules"] == held and values.get("forward") is forward for values, held, forward in self._held):
            self._take_note()

    def _take_note(self) -> None:
        parts = [(layer, name, part) for layer in self._layers for name, part in layer.module.named_modules()]
        self._parts = [(layer, name, vars(part)) for layer, name, part in parts]
        self._held = [(values, dict(values["_modules"]), values.get("forward")) for _, _, values in self._parts]
        divided = [vars(part)["forward"] for _, _, part in parts if tensor_parallel.is_divided(part)]
        self._divided = {id(forward): forward for forward in divided}

    @property
    def divides(self) -> bool:
        """Whether tensor parallelism divides layers."""
        return bool(self._divided)

    def trouble(self) -> str:
        """The reason in a clause, empty without any."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks:
            return "hooks on all modules"
        for layer, name, values in self._parts:  # at every token: dictionaries and truth values alone
            if "forward" in values and id(values["forward"]) not in self._divided:
                style = compat.parallel_style(layer.module.get_submodule(name))
                how = f"is divided as {style}" if style else "has a forward of its own"
                return f"{_path(layer, name)} {how}"
            if values["_backward_hooks"] or values["_backward_pre_hooks"]:
                return f"{_path(layer, name)} has backward hooks"
            if name and _has_hooks(values):
                return f"{_path(layer, name)} has hooks"
            if values["training"] and values.get("gradient_checkpointing"):
                return f"{_path(layer, name)} is checkpointed"
        return ""


class Beside:
    """The modules of a model beside its layers, as they are at the moment."""

    def __init__(self, model: nn.Module, layers: Iterable[Layer]):
        self._model, self._layers = model, {id(layer.module) for layer in layers}
        self._take_note()

    def _take_note(self) -> None:
        found, known = [self._model], set(self._layers)
        for module in found:  # grows meanwhile
            new = [child for child in module.children() if id(child) not in known]
            known.update(map(id, new))
            found += new
        self._held = [(vars(module), dict(module._modules)) for module in found]

    def hooked(self) -> bool:
        """Whether one of them has forward hooks."""
        if not all(values["_modules"] == held for values, held in self._held):
            self._take_note()
        return any(_has_hooks(values) for values, _ in self._held)


def _has_hooks(values: dict[str, Any]) -> bool:
    """Whether a module with these attributes has forward hooks, but for those that transformers leaves there."""
    return bool(values["_forward_pre_hooks"] or (values["_forward_hooks"] and compat.without_recorders(values["_forward_hooks"])))


def _path(layer: Layer, name: str) -> str:
    return f"{layer.path}.{name}" if name else layer.path


def hooked(layer: Layer) -> bool:
    """Whether the layer itself has forward hooks."""
    return _has_hooks(vars(layer.module))


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that differ in their number and in the values of their weights only, as far as compiled code asks."""
    return tuple(_described(layer))


_PLAIN = (bool, int, float, str, type(None), tuple, frozenset)


def _described(layer: nn.Module) -> Iterator[Any]:
    for name, part in layer.named_modules():
        values = {k: v for k, v in vars(part).items() if isinstance(v, _PLAIN) and k != NUMBER and not (k.startswith("_") and k in _NN)}
        tensors = [
            (kind, key, None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad, type(t)))
            for kind, found in (("p", part._parameters), ("b", part._buffers))
            for key, t in found.items()
        ]
        yield name, type(part), repr(sorted(values.items())), tuple(tensors)


_NN = frozenset(vars(nn.Module()))
