"""What a recorded step depends on beside its own buffers, as far as Python shows it: it is compared before the step is replayed again."""

from __future__ import annotations

from typing import Any

import torch


def model_state(model: Any) -> Any:
    """All of a model that a recorded step depends on, as far as Python shows it: where weights lie, and the modules' plain attributes,
    hooks and compiled code. Equal for two calls between which nothing changed."""
    modules: list[Any] = []  # flat, and one loop: it is asked in every call of `generate()`, of hundreds of modules
    for module in model.modules():
        modules += (type(module), id(module))
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN):
                modules += (name, value)
            elif name in _TENSORS:
                for held in value.values():
                    modules += (None,) if held is None else (address(held), held.dtype, held.shape)
            elif name in _HOOKS:
                modules += (name, *map(id, value.values()))
            elif callable(value) and name != "generate":
                modules += (name, id(value))
    settings = tuple((name, value) for name, value in vars(model.config).items() if isinstance(value, _PLAIN))
    process = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
    return modules, settings, process


def address(tensor: torch.Tensor) -> Any:
    """Where a tensor's memory begins."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own: no two calls are alike
        return object()


_PLAIN = (bool, int, float, str, type(None))
_TENSORS = ("_parameters", "_buffers")
# dictionaries of hooks, by what a module calls them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
