"""What a recorded step depends on beside its own buffers, as far as Python shows it: it is compared before the step is replayed again."""

from __future__ import annotations

from typing import Any

import torch


def model_state(model: Any) -> Any:
    """All of a model that a recorded step depends on, as far as Python shows it: where weights lie, and the modules' plain attributes,
    hooks and compiled code. Equal for two calls between which nothing changed."""
    tensors = tuple((address(t), t.dtype, t.shape) for ts in (model.parameters(), model.buffers()) for t in ts)
    modules = tuple(_module_state(module) for module in model.modules())
    settings = tuple((name, value) for name, value in vars(model.config).items() if isinstance(value, _PLAIN))
    process = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
    return tensors, modules, settings, process


def address(tensor: torch.Tensor) -> Any:
    """Where a tensor's memory begins."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own: no two calls are alike
        return object()


_PLAIN = bool | int | float | str | None
# dictionaries of hooks, by what a module calls them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _module_state(module: torch.nn.Module) -> Any:
    own = vars(module)
    plain = tuple((name, value) for name, value in own.items() if isinstance(value, _PLAIN))
    code = tuple((name, id(value)) for name, value in own.items() if callable(value) and name != "generate")
    hooks = tuple(tuple(map(id, own[name].values())) for name in _HOOKS)
    return type(module), id(module), plain, code, hooks
