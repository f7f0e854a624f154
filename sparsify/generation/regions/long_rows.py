"""Compiles the norm after the last layer for long prompts, where running it uncompiled would fill the GPU's memory.

It lies outside of all regions. Uncompiled, it holds two copies of the residual stream in float32 at once, 32 GiB at a million tokens of an
8B model, in blocks of a size that the allocator keeps for nothing else. Compiled, as in a graph of the whole model, it is one pass without
copies.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.costs import device as hardware
from sparsify.generation.regions.layers import Layer
from sparsify.graph import compat
from sparsify.planning.config.config import Config

log = logging.getLogger(__name__)

# share of the GPU's memory that two copies in float32 may take; compiling costs more time than shorter prompts save
SHARE = 1 / 16


def find_norms(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Module]:
    """The norms beside the list of layers: modules without submodules all of whose weights have one dimension."""
    beside = model.get_submodule(layers[0].path.rpartition(".")[0].rpartition(".")[0])
    leaves = (child for child in beside.children() if not any(True for _ in child.children()))
    return [leaf for leaf in leaves if (held := list(leaf.parameters())) and all(weight.dim() == 1 for weight in held)]


class LongRows:
    """Stands for a norm's call: compiled for inputs whose copies would take more than `SHARE` of the memory, else the module itself."""

    def __init__(self, module: nn.Module, config: Config):
        self.module, self.config = module, config
        self._lock = threading.Lock()
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_dynamo_compiling() and self._serves(args[0]):
            try:
                with self._lock:
                    return self._run(args[0])
            except compat.CANNOT_CAPTURE as error:
                self._failed = True
                log.debug("%s is not compiled", type(self.module).__name__, exc_info=error)
        return self.module._call_impl(*args, **kwargs)

    def _serves(self, rows: Any) -> bool:
        if self._failed or type(rows) is not Tensor or self.config.lower == "eager" or torch.is_grad_enabled():
            return False
        if self.module._forward_hooks or self.module._forward_pre_hooks or "forward" in vars(self.module):
            return False
        memory = hardware.describe(rows.device).memory
        return memory is not None and 2 * 4 * rows.numel() > SHARE * memory

    def _run(self, rows: Tensor) -> Tensor:
        if self._compiled is None:
            options = self.config.inductor_patches() or None
            self._compiled = compat.compile_in_threads(self.module.forward, dynamic=True, options=options)
        return self._compiled(rows)
