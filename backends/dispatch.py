"""Which implementation serves an op on which device, decided at every call, in one table: Hopper, Triton, C++ on CPUs, the reference."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Generator
from typing import Any

import torch

from sparsify import releases
from sparsify.backends import farthest, small_sum
from sparsify.backends.attention import cpp as attention_cpp
from sparsify.backends.attention import empty_rows, empty_rows_triton, hopper
from sparsify.backends.attention import reference as attention_reference
from sparsify.backends.attention import triton as attention_triton
from sparsify.backends.cache import append, decode, mass, one_token, pages, pages_reference, reselection, take_back
from sparsify.backends.cache import reference as cache_reference
from sparsify.backends.codegen import cpp
from sparsify.backends.codegen.launch import meant
from sparsify.backends.ffn import few_rows, in_parts
from sparsify.backends.ffn import reference as ffn_reference
from sparsify.backends.linear import reference as linear_reference
from sparsify.backends.linear import triton as linear_triton
from sparsify.backends.select import cpp as select_cpp
from sparsify.backends.select import patterns, patterns_triton
from sparsify.backends.select import reference as select_reference
from sparsify.backends.select import stages as select_stages
from sparsify.backends.select import triton as select_triton
from sparsify.errors import ConfigError, KernelError, UnsupportedError
from sparsify.ops.call import OpCall
from sparsify.ops.limits import MIN_CAPABILITY

log = logging.getLogger(__name__)

KERNELS = ("auto", "triton", "reference")

# op -> family -> what serves it, best first. An implementation that does not take a call says so by UnsupportedError, before it writes
# anything, and the next one gets the call. None of these modules imports Triton before a kernel is generated.
_TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "attention": {
        "hopper": hopper.attention,
        "triton": attention_triton.triton_attention,
        "cpp": attention_cpp.attention,
        "reference": attention_reference.attention,
    },
    # not an op: what follows attention where a mask may leave rows without a key
    "empty_rows": {"triton": empty_rows_triton.fill, "reference": empty_rows.fill},
    "select_blocks": {
        "triton": select_stages.select_blocks,
        "cpp": select_cpp.select_blocks,
        "reference": select_reference.select_blocks,
    },
    "select_pattern": {"triton": patterns_triton.select_pattern, "reference": patterns.select_pattern},
    # not ops: what several processes choose together, and its lists
    "choose_pattern": {"triton": patterns_triton.chosen, "reference": patterns.chosen},
    "list_pattern": {"triton": patterns_triton.listed, "reference": patterns.listed},
    "cache_attention": {"triton": append.cache_attention, "reference": cache_reference.cache_attention},
    "cache_bounds": {"triton": pages.cache_bounds, "reference": pages_reference.cache_bounds},
    "cache_decode": {"triton": decode.cache_decode, "cpp": one_token.cache_decode, "reference": cache_reference.cache_decode},
    "cache_length": {"reference": cache_reference.cache_length},
    "cache_mass": {"triton": mass.cache_mass, "reference": cache_reference.cache_mass},
    "cache_observe": {"reference": reselection.cache_observe},
    "cache_reselect": {"reference": reselection.cache_reselect},
    "cache_store": {"reference": cache_reference.cache_store},
    "farthest_first": {"triton": farthest.by_kernel, "reference": farthest.reference},
    "ffn": {"triton": few_rows.ffn, "reference": ffn_reference.ffn},
    "ffn_parts": {"triton": in_parts.with_kernel, "reference": in_parts.plain},
    "ffn_prompt": {"reference": ffn_reference.ffn_prompt},
    "ffn_start": {"triton": few_rows.ffn_start, "reference": ffn_reference.ffn_start},
    # not an op: key cells of a selection, where several selections multiply them or they travel
    "prepare_keys": {"triton": select_triton.prepare_keys, "reference": select_reference.prepare_keys},
    "linear": {"triton": linear_triton.linear, "reference": linear_reference.linear},
    # not an op: it belongs to no graph that is compiled, and takes all layers of a cache at once
    "take_back": {"triton": take_back.by_kernel, "reference": take_back.reference},
    "small_sum": {"reference": small_sum.small_sum},
}

# what serves calls of which nothing else is said, in every thread
_kernels = "auto"

# what the compiled model that runs here asked for, None where it left that open
_kernels_here: contextvars.ContextVar[str | None] = contextvars.ContextVar("sparsify_kernels", default=None)
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_strict", default=False)


@contextlib.contextmanager
def serving(kernels: str = "auto", strict: bool = False) -> Generator[None]:
    """In this block, in this thread: what serves the ops, and whether failures raise; everything else keeps its own ways.

    Args:
        kernels: as `use` takes it; "auto" leaves what is said outside.
        strict: a kernel that fails and an estimate that runs out of memory raise; otherwise they cost a warning and time. False leaves
            what is said outside.
    """
    kernels_token = _kernels_here.set(_kernels_here.get() if _checked(kernels) == "auto" else kernels)
    strict_token = _strict.set(strict or _strict.get())
    try:
        yield
    finally:
        _strict.reset(strict_token)
        _kernels_here.reset(kernels_token)


def strict() -> contextlib.AbstractContextManager[None]:
    """In this block a kernel that fails and an estimate that runs out of memory raise; elsewhere they cost a warning and time."""
    return serving(strict=True)


def _wanted() -> str:
    return _kernels_here.get() or _kernels


def use(kernels: str) -> None:
    """Says what serves the ops from now on, in this process, but for compiled models that say it themselves.

    Args:
        kernels: "auto" (Triton on CUDA devices that it supports, C++ on CPUs where there is a compiler, the reference elsewhere and for
            calls that those kernels do not take), "triton" (or an error) or "reference".

    Raises:
        ConfigError: another word.
    """
    global _kernels
    _kernels = _checked(kernels)


def available(device: torch.device | str, kernels: str | None = None) -> tuple[str, str]:
    """("triton" | "reference", reason): what serves the ops on `device` where `kernels` is asked for (default: as `serving` or `use` say);
    on a CPU some have a C++ kernel before the reference (`attention_family`).

    Raises:
        UnsupportedError: "triton" is asked for and cannot run there.
        ConfigError: `kernels` is not one of `KERNELS`.
    """
    wanted = _wanted() if kernels is None else _checked(kernels)
    device = meant(torch.device(device))
    if wanted == "reference":
        return "reference", "asked for"
    obstacle = _obstacle(device.type, device.index, wanted)
    if obstacle is None:
        return "triton", "asked for" if wanted == "triton" else f"{device.type} device that Triton supports"
    if wanted == "triton":
        raise UnsupportedError(f"Triton kernels cannot run here: {obstacle}", where=str(device), hint="'auto' takes what runs here")
    return "reference", obstacle


def attention_family(device: torch.device, kernels: str | None = None) -> tuple[str, str]:
    """What serves attention over long prompts on a device: a family in the table, and why it is no other.

    Args:
        kernels: as for `available`, which says what is raised.
    """
    served, reason = available(device, kernels)
    if served == "triton":
        return ("hopper" if hopper.ready(device) else "triton"), reason
    obstacle = _cpp_obstacle(device, _wanted() if kernels is None else kernels)
    return ("reference", f"{reason}, {obstacle}" if obstacle else reason) if obstacle is not None else ("cpp", reason)


def _cpp_obstacle(device: torch.device, wanted: str) -> str | None:
    """Why no C++ kernel serves a device, "" where none is asked for or there is none for it; None where one does."""
    return "" if wanted != "auto" or meant(device).type != "cpu" else cpp.obstacle()


def _checked(kernels: str) -> str:
    if kernels not in KERNELS:
        raise ConfigError(f"must be one of {', '.join(map(repr, KERNELS))}, not {kernels!r}", where="kernels")
    return kernels


@functools.cache
def _obstacle(device_type: str, index: int | None, wanted: str) -> str | None:
    """Why Triton kernels cannot run on a device when `wanted` is asked for; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if old := releases.obstacle("triton"):
        return old
    if device_type == "cpu":
        # the interpreter is for tests: it must be asked for twice
        return None if os.environ.get("TRITON_INTERPRET") == "1" and wanted == "triton" else "no GPU"
    if device_type != "cuda":
        return f"no Triton kernels for {device_type} devices"
    if torch.version.hip is not None:
        return "AMD GPUs are not supported"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def serve(op: str) -> Callable[..., Any]:
    """A function that hands each call of an op to the first implementation in the table that takes it.

    It raises what the last of them raises, and KernelError from any of them under `strict`, where kernels are demanded and where memory
    ran out; elsewhere a kernel that fails costs one warning, and time.
    """

    if list(_TABLE[op]) == ["reference"]:
        return _implementation(op, "reference")

    def call(first: OpCall | torch.Tensor, *args: Any, **options: Any) -> Any:
        families = _families(op, first.device)
        for family, following in itertools.pairwise(families):
            try:
                return _implementation(op, family)(first, *args, **options)
            except (UnsupportedError, KernelError) as error:
                if isinstance(error, KernelError) and (_strict.get() or _wanted() == "triton" or out_of_memory(error)):
                    raise
                # that a kernel leaves a call to another kernel is in the order of things
                if following == "reference" or isinstance(error, KernelError):
                    _warn_once(op, "slow reference" if following == "reference" else f"{following} kernel", str(error))
        return _implementation(op, families[-1])(first, *args, **options)

    return call


def _families(op: str, device: torch.device) -> tuple[str, ...]:
    """The table's families that may serve a call on a device, best first: never none."""
    if available(device)[0] == "reference":
        here = "cpp" in _TABLE[op] and _cpp_obstacle(device, _wanted()) is None
        return ("cpp", "reference") if here else ("reference",)
    out = {"hopper": not hopper.ready(device), "reference": _wanted() == "triton", "cpp": True}
    return tuple(family for family in _TABLE[op] if not out.get(family))


def first_families(device: torch.device) -> dict[str, str]:
    """For every op the family that calls on a device go to first."""
    return {op: _families(op, device)[0] for op in _TABLE}


def _implementation(op: str, family: str) -> Callable[..., Any]:
    return _TABLE[op][family]


@functools.cache
def _warn_once(op: str, instead: str, reason: str) -> None:
    log.warning("%s runs the %s: %s", op, instead, reason)


def is_strict() -> bool:
    """Whether a failure raises here; see `serving`."""
    return _strict.get()


def out_of_memory(error: BaseException | None) -> bool:
    """torch has an error of its own for devices; its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, KernelError):
        return out_of_memory(error.__cause__)
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)
