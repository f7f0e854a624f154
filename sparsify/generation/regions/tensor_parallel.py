"""Modules that transformers' `tp_plan` divides, as plain modules over this process's part of their weights.

transformers divides a linear layer by replacing its forward with a function that exchanges DTensors for their local part, calls the layer
and combines what the processes have. Where gradients play no part this is a product with the local part and, for layers that are divided
by their input, a sum over the processes. Written so, layers of a kind share compiled code, and generated kernels serve the products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import pipeline
from sparsify.costs import links
from sparsify.distributed import collectives, peers, shards
from sparsify.distributed.shards import Shard
from sparsify.generation import compat
from sparsify.planning.config.config import Config

# how a module is divided: by rows of its weight (its output is), by columns (its input is), or not at all
BY_OUTPUT, BY_INPUT, WHOLE = "output", "input", "whole"


class SummedLinear(nn.Linear):
    """A linear layer that is divided by its input: this process's part of the product, added up over the processes of `group`."""

    group: str

    def forward(self, input: Tensor) -> Tensor:
        result = collectives.all_reduce(F.linear(input, self.weight), self.group)
        bias: Tensor | None = self._parameters["bias"]
        return result if bias is None else result + bias


def division(module: nn.Module) -> str:
    """How a module whose forward transformers replaced is divided; empty where that is not known, or not by transformers."""
    found = compat.parallel_style(module)
    if found is None or any(shards.is_dtensor(t) and t.device_mesh.ndim != 1 for t in module._parameters.values()):
        return ""
    return _DIVISIONS.get(found, "") if found == "replicated" or type(module) is nn.Linear else ""


_DIVISIONS = {"colwise": BY_OUTPUT, "rowwise": BY_INPUT, "replicated": WHOLE}


def local(module: nn.Module) -> nn.Module:
    """A module that computes without gradients what a divided one does, over the same memory. module: `division` knows it."""
    how = division(module)
    kind = SummedLinear if how == BY_INPUT else type(module)
    twin: Any = object.__new__(kind)
    twin.__dict__.update(vars(module))
    del twin.__dict__["forward"]
    twin.__dict__.pop("_compiled_call_impl", None)
    twin.__dict__["_parameters"] = {name: _local(parameter) for name, parameter in module._parameters.items()}
    if how == BY_INPUT:
        found = shards.find(module._parameters.values())
        if found is None:
            raise ValueError("a linear layer that is divided by its input has no divided weight")
        twin.__dict__["group"] = found.group
    return twin


def _local(parameter: Any) -> Any:
    return nn.Parameter(parameter.to_local(), requires_grad=False) if shards.is_dtensor(parameter) else parameter


def is_divided(module: nn.Module) -> bool:
    """Whether `local` has another module for it."""
    return division(module) != ""


def prepare_sums(share: Shard, device: torch.device, config: Config) -> None:
    """Lets the sums of a token be read from peers where that is possible, asked for and expected to pay. All processes of a share call it.

    Raises:
        DistributedError: as `peers.prepare`.
    """
    if config.peer_sums:
        peers.prepare(share.group, device, links.peer_bytes(share.size, pipeline.make_context(device, config).device))


def of_heads(layer: nn.Module) -> Shard | None:
    """Which share of the heads of a layer's attention is this process's; None where attention is not divided."""
    for part in layer.modules():
        if hasattr(part, "config") and "layer_idx" in vars(part):
            by_output = [child for child in part.children() if division(child) == BY_OUTPUT]
            if by_output:
                return shards.find(by_output[0]._parameters.values())
    return None
