"""Mends Triton's interpreter for tests; import it before any kernel runs.

With numpy >= 2.4 every loop with a run-time bound fails, a bf16 `tl.dot` multiplies the raw 16-bit patterns, and numbers that become bf16
are cut off. From 3.7 on the product of a constexpr and a tensor is a constexpr that holds a tensor, which the next operation does not take.
Instructions that kernels write by hand run as `ptx_machine` says.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

from tests.support import ptx_machine


def install() -> None:
    """Patches the interpreter once per process."""
    if getattr(interpreter, "_sparsify_mended", False):
        return
    interpreter._sparsify_mended = True
    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        # int() of a one-element array of one dimension is an error since numpy 2.4
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def float_operand(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        widened = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(widened, tl.float32)

    def dot(self, a, b, accumulator, precision, max_imprecise):
        return create_dot(self, float_operand(a), float_operand(b), accumulator, precision, max_imprecise)

    def bf16(self, value):
        """A constant, which the interpreter has in all other dtypes."""
        bits = np.array([value], dtype=np.float32).view(np.uint32) >> np.uint32(16)
        return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        """fp32 to bf16 as GPUs do it: to the nearest, of two the even one; the interpreter cuts off."""
        if source != tl.float32 or target != tl.bfloat16 or rounding_mode is not None:
            return convert(data, source, target, rounding_mode)
        numbers = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).reshape(-1))
        return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))

    interpreter._convert_float = convert_float

    class Results(list):
        def get_result(self, i):
            return self[i]

    def inline_asm(self, asm, constraints, values, types, is_pure, pack):
        """One tensor in and one out, elements of 16 bits, two in a register."""
        (held,), (out,) = values, types
        assert pack == 2 and held.data.itemsize == 2, "other widths have registers of other shapes"
        (found,) = ptx_machine.run(asm, [np.ascontiguousarray(held.data).view(np.uint32)], 1)
        scalar = out.scalar if hasattr(out, "scalar") else out
        return Results([interpreter.TensorHandle(found.view(np.float16), scalar)])

    interpreter.InterpreterBuilder.create_inline_asm = inline_asm
    interpreter.InterpreterBuilder.get_bf16 = bf16
    to_tensor = TritonSemantic.to_tensor

    def unwrapped(self, value, check_type=True):
        held = value.value if isinstance(value, tl.constexpr) else value
        return held if isinstance(held, tl.tensor) else to_tensor(self, value, check_type)

    TritonSemantic.to_tensor = unwrapped
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = dot
