"""Runs the few PTX instructions that generated kernels write by hand (`tl.inline_asm_elementwise`), which Triton's interpreter does not.

PTX ISA, chapter 9 (and, shr, prmt without its mode, mov of vectors, cvt.rn.f16x2.e4m3x2). Any other instruction is an error.
"""

from __future__ import annotations

import re

import numpy as np
import torch


def run(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """32-bit registers after the text, one array of uint32 each. Inputs: uint32 of one shape, the registers behind the outputs."""
    registers: dict[str, np.ndarray] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in re.split(r";", text.strip().removeprefix("{").removesuffix("}")):
        parts = statement.split(None, 1)
        if not parts or parts[0] == ".reg":
            continue
        name, operands = parts[0], [one.strip() for one in re.findall(r"\{[^}]*\}|[^,]+", parts[1])]
        target, given = operands[0], [_value(one, registers) for one in operands[1:]]
        if name == "mov.b32" and target.startswith("{"):
            low, high = target.strip("{}").split(",")
            registers[low.strip()], registers[high.strip()] = given[0] & 0xFFFF, given[0] >> np.uint32(16)
        elif name == "and.b32":
            registers[target] = given[0] & given[1]
        elif name == "shr.b32":
            registers[target] = given[0] >> given[1]
        elif name == "prmt.b32":
            registers[target] = _permuted(*given)
        elif name == "cvt.rn.f16x2.e4m3x2":
            registers[target] = _half(given[0] & 0xFF) | (_half(given[0] >> np.uint32(8)) << np.uint32(16))
        else:
            raise NotImplementedError(f"PTX {name}")
    return [registers[f"${i}"] for i in range(outputs)]


def _value(operand: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    return registers[operand] if operand in registers else np.uint32(int(operand, 0))


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of the eight of b and a."""
    found = np.uint32(0)
    for place in range(4):
        chosen = (int(selector) >> (4 * place)) & 7
        source = a if chosen < 4 else b
        found = found | (((source >> np.uint32(8 * (chosen % 4))) & np.uint32(0xFF)) << np.uint32(8 * place))
    return found


def _half(code: np.ndarray) -> np.ndarray:
    """The bits of an E4M3 number as fp16."""
    numbers = torch.from_numpy(np.ascontiguousarray(code).astype(np.uint8)).view(torch.float8_e4m3fn).half()
    return numbers.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
