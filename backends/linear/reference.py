"""`sparsify::linear` in plain PyTorch, operation by operation as models write it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.ops.linear import LinearCall

_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def linear(call: LinearCall) -> list[Tensor]:
    """Outputs of a call that was checked."""
    x = _normalised(call)
    outputs = [functional.linear(x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    if call.gated:
        return [_ACTIVATIONS[call.activation](outputs[0]) * outputs[1]]
    return outputs if call.residual is None else [call.residual + outputs[0]]


def _normalised(call: LinearCall) -> Tensor:
    if call.norm_weight is None:
        return call.input
    wide = call.input.to(torch.promote_types(call.input.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + call.eps)
    if call.norm == "rms":
        return call.norm_weight * wide.to(call.input.dtype)
    weight = call.norm_weight.to(wide.dtype)
    return (wide * (1.0 + weight if call.norm == "rms_offset" else weight)).to(call.input.dtype)
