"""What a recorded step depends on beside its own buffers, as far as Python shows it: it is compared before the step is replayed again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sparsify.generation import compat


def model_state(model: Any) -> Any:
    """All of a model that a recorded step depends on, as far as Python shows it: where weights and other tensors lie, and the modules'
    attributes, hooks, functions and configurations. Equal for two calls between which nothing changed; keeps nothing of the model alive."""
    found: list[Any] = []  # flat, and one loop: it is asked in every call of `generate()`, of hundreds of modules
    seen: dict[int, int] = {}
    for module in model.modules():
        found += _identity(module)
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN):
                found += (name, value)
            elif name in _TENSORS:
                for held in value.values():
                    found += _described(held, seen)
            elif name in _HOOKS:
                found.append(name)
                for key, hook in value.items():  # no two hooks get one key, but an object may get the place of one that is gone
                    found += (key, *_identity(hook))
            elif name not in _NN and name not in _OWN:
                found.append(name)
                found += _described(value, seen)
    found += _described(model.config, seen)
    everywhere = nn.modules.module
    hooks = (*everywhere._global_forward_hooks, *everywhere._global_forward_pre_hooks)
    process = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
    return found, hooks, process


def hooked(model: nn.Module) -> str:
    """The first module with a hook that a recorded step would not call, as a clause; empty without any.

    Hooks of torch's and transformers' own compute from what they are given, and are recorded with the step.
    """
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "all modules have hooks"
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(map(_is_library, compat.without_recorders(hooks).values())):
                return f"{name or 'the model'} has hooks"
    return ""


def _is_library(hook: Any) -> bool:
    named = getattr(hook, "func", hook)  # what a partial is of
    if (owner := getattr(named, "__self__", None)) is not None:  # a method of a user's class may be torch's to call
        named = type(owner)
    return (getattr(named, "__module__", None) or type(named).__module__).partition(".")[0] in ("torch", "transformers")


def _described(value: Any, seen: dict[int, int]) -> Iterator[Any]:
    """What a value is, without keeping it alive. seen: containers that were described, in which order, by their ids."""
    if isinstance(value, _PLAIN):
        yield value
    elif isinstance(value, Tensor):
        yield from (address(value), value.dtype, value.shape)
    elif isinstance(value, (torch.dtype, torch.device)):
        yield value
    elif isinstance(value, (dict, list, tuple, set, frozenset, PreTrainedConfig)):
        known = id(value) in seen
        yield from (type(value), seen.setdefault(id(value), len(seen)))
        if not known:
            held = vars(value) if isinstance(value, PreTrainedConfig) else value
            yield len(held)
            for entry in held.items() if isinstance(held, dict) else ((one,) for one in held):
                for part in entry:
                    yield from _described(part, seen)
    else:
        yield from _identity(value)


def _identity(value: Any) -> tuple[Any, ...]:
    """Equal for one object as long as it lives, and for no other: ids are given again, and references that live are compared by value."""
    try:
        return id(value), weakref.ref(value)
    except TypeError:
        return id(value), type(value)


def address(tensor: Tensor) -> Any:
    """Where a tensor's memory begins."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own: no two calls are alike
        return object()


_PLAIN = (bool, int, float, str, type(None))
_TENSORS = ("_parameters", "_buffers")
# dictionaries of hooks, by what a module calls them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# what `generate()` writes: itself, and numbers of a prompt that a token with positions does not read
_OWN = ("generate", "rope_deltas")
_NN = frozenset(vars(nn.Module())) - {*_TENSORS, *_HOOKS}
