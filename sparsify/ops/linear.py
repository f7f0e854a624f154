"""`sparsify::linear`: up to three linear layers of one input, with what stands around them in a decoder layer. For a token of each row.

    n = norm(input),  y_i = n · weight_iᵀ + bias_i
    activation:  one output, act(y_1) · y_2
    residual:    one output, residual + y_1

Each y_i is rounded to the input's dtype before what follows it. The norm is an RMS norm, `sparsify.matching.sites.Norm`, or none.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import define

# Compiled graphs are cached by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 1
NORMS = ("none", "rms", "rms_fp32", "rms_offset")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, eq=False)
class LinearCall(OpCall):
    """One call of `sparsify::linear`.

    input: [rows, inputs], floating point; every tensor has its dtype.
    weight, weight_2, weight_3: [outputs, inputs] each, with outputs of its own; with an activation `weight` is the gate's, `weight_2` up's,
        and they have the same shape.
    bias, bias_2, bias_3: [outputs] of their weights.
    residual: [rows, outputs], without an activation and with one weight.
    norm_weight: [inputs]; given when there is a norm.
    norm: one of `NORMS`.
    eps: of the norm.
    activation: one of `ACTIVATIONS`.
    early: the weights may be read while the kernel before this call still runs: it does not write them.
    """

    NAME: ClassVar[str] = "linear"
    VERSION: ClassVar[int] = VERSION
    UNREAD: ClassVar[tuple[str, ...]] = ("early",)

    input: Annotated[Tensor, Operand("rows inputs")]
    weight: Annotated[Tensor, Operand("outputs inputs")]
    _: KW_ONLY
    weight_2: Annotated[Tensor | None, Operand("outputs_2 inputs")] = None
    weight_3: Annotated[Tensor | None, Operand("outputs_3 inputs")] = None
    bias: Annotated[Tensor | None, Operand("outputs")] = None
    bias_2: Annotated[Tensor | None, Operand("outputs_2")] = None
    bias_3: Annotated[Tensor | None, Operand("outputs_3")] = None
    residual: Annotated[Tensor | None, Operand("rows outputs")] = None
    norm_weight: Annotated[Tensor | None, Operand("inputs")] = None
    norm: str = "none"
    eps: float = 0.0
    activation: str = "none"
    early: bool = False

    @property
    def rows(self) -> int:
        return self.input.shape[0]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(weight for weight in (self.weight, self.weight_2, self.weight_3) if weight is not None)

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Of each weight."""
        return (self.bias, self.bias_2, self.bias_3)[: len(self.weights)]

    @property
    def gated(self) -> bool:
        return self.activation != "none"

    def check(self) -> None:
        """Checks that the arguments fit together.

        Raises:
            UnsupportedError: says what is wrong.
        """
        super().check()
        need = self.need
        need(self.weight_3 is None or self.weight_2 is not None, "a third weight without a second")
        need(self.norm in NORMS and self.activation in ACTIVATIONS, f"norm {self.norm!r}, activation {self.activation!r}")
        need((self.norm_weight is None) is (self.norm == "none"), f"norm {self.norm!r} and its weight", "both or none")
        need(not self.gated or [tuple(weight.shape) for weight in self.weights] == [tuple(self.weight.shape)] * 2, "a gate without its up")
        need(self.residual is None or len(self.weights) == 1, "a residual of several outputs")
        need(all(bias is None for bias in (self.bias_2, self.bias_3)[len(self.weights) - 1 :]), "a bias without its weight")

    def empty_outputs(self) -> list[Tensor]:
        """Uninitialised outputs, [rows, outputs] of each weight, or one in all."""
        weights = self.weights[:1] if self.gated else self.weights
        return [self.input.new_empty(self.rows, weight.shape[0]) for weight in weights]


linear = define(LinearCall, LinearCall.empty_outputs, "Tensor[]")
