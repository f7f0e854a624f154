"""Exact caches that generate() borrows, kept between calls with the graphs that were recorded over them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsify.generation.full import full_cache
from sparsify.generation.loop import Session
from sparsify.generation.sparse_cache import SparseCache

# a cache is kept where it takes no more than this share of the device's memory
_SHARE = 0.125
# a cache of so many times the tokens is used rather than another made
_LARGER = 4
_LEAST = 4096  # or of no more than so many


@dataclass(eq=False)
class Loan:
    """A cache that one call has for itself. sessions: steps recorded over it."""

    cache: SparseCache
    rows: int
    tokens: int
    model_state: Any
    sessions: dict[Any, Session] = field(default_factory=dict)


class KeptCaches:
    """At most one idle cache of a model."""

    def __init__(self) -> None:
        self._idle: Loan | None = None
        self._lock = threading.Lock()

    def borrow(self, model: Any, rows: int, tokens: int) -> Loan:
        """A cache that is empty, with room for `tokens` of each row.

        Raises:
            UnsupportedError: no SparseCache serves the model.
        """
        with self._lock:
            idle, self._idle = self._idle, None
        fits = idle is not None and idle.rows == rows and tokens <= idle.tokens <= max(_LARGER * tokens, _LEAST)
        if fits and idle.model_state == model_state(model):
            idle.cache.reset()
            return idle
        del idle  # its memory may be needed
        tokens = _rounded(tokens)
        cache = full_cache(model.config, rows, tokens, model.device, model.dtype)
        return Loan(cache, rows, tokens, model_state(model))

    def give_back(self, loan: Loan, clean: bool) -> None:
        """clean: nobody else has the cache, and the call that borrowed it came to its end."""
        recorded = any(session.runner.keeps for session in loan.sessions.values())
        if not clean or not recorded or torch.is_inference_mode_enabled():
            return
        device = loan.cache.layers[0].keys.device
        if device.type == "cuda" and loan.cache.kept_bytes() > _SHARE * torch.cuda.get_device_properties(device).total_memory:
            return
        loan.tokens = loan.cache.layers[0].keys.shape[2]
        with self._lock:
            self._idle = loan


def _rounded(tokens: int) -> int:
    """So many tokens or a quarter more, of few different numbers, so that calls of other lengths find a cache again."""
    step = max(256, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def model_state(model: Any) -> Any:
    """All of a model that a recorded step depends on, as far as Python shows it: where weights lie, and the modules' plain attributes,
    hooks and compiled code. Equal for two calls between which nothing changed."""
    tensors = tuple((_address(t), t.dtype, t.shape) for ts in (model.parameters(), model.buffers()) for t in ts)
    modules = tuple(_module_state(module) for module in model.modules())
    settings = tuple((name, value) for name, value in vars(model.config).items() if isinstance(value, _PLAIN))
    process = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
    return tensors, modules, settings, process


def _address(tensor: torch.Tensor) -> Any:
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
