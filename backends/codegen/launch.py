"""What launches of generated kernels share on the host: dtypes, what a device has, how work is split, and how a failure is told."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import ahead
from sparsify.backends.codegen.arguments import Argument
from sparsify.errors import KernelError, SparsifyError, UnsupportedError
from sparsify.ops.limits import cdiv

# dtypes as specs name them
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2E = math.log2(math.e)
# a window as kernels take it: positions plus a window stay within 32 bits
LONGEST_WINDOW = 1 << 30
# Triton's interpreter, which tests use, runs programs one by one: few, and a number that divides nothing
_INTERPRETED_PROCESSORS = 3


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`, from 1 on."""
    return 1 << (size - 1).bit_length()


def need(holds: bool, what: str, where: str) -> None:
    """Raises UnsupportedError, so that the reference serves the call, unless what a kernel needs holds."""
    if not holds:
        raise UnsupportedError(what, where=where, hint="the reference serves it")


# the device that tensors without memory stand for
_meant: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("sparsify_meant_device", default=None)


@contextlib.contextmanager
def meaning(device: torch.device) -> Generator[None]:
    """In this block, in this thread, tensors on `meta` stand for tensors on this device."""
    token = _meant.set(device)
    try:
        yield
    finally:
        _meant.reset(token)


def meant(device: torch.device) -> torch.device:
    """The device itself, or what stands for `meta` here."""
    return _meant.get() or device if device.type == "meta" else device


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    device = meant(device)
    return properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_PROCESSORS


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of Hopper where the interpreter runs."""
    device = meant(device)
    return (properties(device).major, properties(device).minor) if device.type == "cuda" else (9, 0)


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended (programmatic dependent launch, Hopper and later)."""
    return meant(device).type == "cuda" and capability(device) >= (9, 0)


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a thread block of a CUDA device may take."""
    return properties(meant(device)).shared_memory_per_block_optin


@functools.cache
def properties(device: torch.device) -> Any:
    """What torch tells of a CUDA device."""
    return torch.cuda.get_device_properties(device)


def choose_splits(tiles: int, rows: int, programs: int, most: int = 128) -> int:
    """Into how many splits, all of the same number of tiles but the last, the tiles of each of `rows` are cut.

    Args:
        programs: that run at once; all splits together are about one wave of them.
        most: splits of one row.
    """
    wanted = max(1, min(tiles, programs // rows, most))
    return cdiv(tiles, cdiv(tiles, wanted))


@functools.lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 tensor of numbers that calls repeat, such as windows per head; copied once."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def batch_stride(operand: Tensor) -> int:
    """Elements from one batch row to the next; 0 where one row serves all."""
    return broadcast_stride(operand, 0)


def broadcast_stride(operand: Tensor, dim: int) -> int:
    """Elements from one place of a dimension to the next; 0 where one serves all."""
    return 0 if operand.shape[dim] == 1 else operand.stride(dim)


def stride_values(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """`name_axis` for each of a tensor's leading axes, which are named by letters."""
    return {f"{name}_{axis}": step for name, (tensor, axes) in tensors.items() for axis, step in zip(axes, tensor.stride())}


@contextlib.contextmanager
def launching(device: torch.device, where: Callable[[], str]) -> Generator[None]:
    """Compiles and launches on a device.

    Args:
        where: says what was to be launched, for an error.

    Raises:
        KernelError: in place of what Triton raises.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except SparsifyError:
        raise
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        hint = "kernels = 'reference' computes the same; please report the line above"
        raise KernelError(f"{type(error).__name__}: {last}", where=where(), hint=hint) from error


def launch(kernel: Any, grid: tuple[int, ...], arguments: Iterable[Argument], values: Mapping[str, Any], **options: int) -> None:
    """Launches a kernel with those of the values that it takes.

    Args:
        options: Triton's own, such as num_warps.
    """
    arguments = tuple(arguments)
    given = [values[argument.name] for argument in arguments]
    if not ahead.meet(kernel, arguments, given, options):
        kernel[grid](*given, **options)
