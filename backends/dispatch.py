"""Which implementation serves an op on which device, decided at every call: generated Triton kernels or the reference."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify import releases
from sparsify.errors import ConfigError, KernelError, UnsupportedError
from sparsify.ops import attention as ops
from sparsify.ops import block_lists, gradients

log = logging.getLogger(__name__)

KERNELS = ("auto", "triton", "reference")
MIN_CAPABILITY = (8, 0)

# op -> implementation -> module and function, imported when first called: the CPU path never imports Triton
_IMPLEMENTATIONS = {
    "attention": {
        "reference": ("sparsify.backends.attention.triton", "reference_attention"),
        "triton": ("sparsify.backends.attention.hopper", "attention"),
    },
    "select_blocks": {
        "reference": ("sparsify.backends.select.reference", "select_blocks"),
        "triton": ("sparsify.backends.select.triton", "select_blocks"),
    },
}

# not an op: what follows attention where a mask may leave rows without a key
_IMPLEMENTATIONS["empty_rows"] = {
    "reference": ("sparsify.backends.attention.empty_rows", "fill"),
    "triton": ("sparsify.backends.attention.empty_rows_triton", "fill"),
}

# operands of the attention op that no attention kernel reads
_FILLED_BY = ("empty_rows", "lowest", "hidden_bias")
_OPERANDS = ("key_flags", "segments", "query_start", "block_counts", "block_indices", "key_bias")

# what serves calls of which nothing else is said, in every thread
_kernels = "auto"

# what the compiled model that runs here asked for, None where it left that open
_kernels_here: contextvars.ContextVar[str | None] = contextvars.ContextVar("sparsify_kernels", default=None)
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_strict", default=False)


@contextlib.contextmanager
def serving(kernels: str = "auto", strict: bool = False) -> Iterator[None]:
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


def recovers(error: UnsupportedError | KernelError) -> bool:
    """Whether the reference takes over from a kernel that failed so: never where Triton is demanded or, for failures, under `strict`."""
    return _wanted() != "triton" and (isinstance(error, UnsupportedError) or not (_strict.get() or _out_of_memory(error)))


def use(kernels: str) -> None:
    """Says what serves the ops from now on, in this process, but for compiled models that say it themselves.

    Args:
        kernels: "auto" (Triton on CUDA devices that it supports, the reference elsewhere and for calls that Triton kernels do not
            take), "triton" (or an error) or "reference".

    Raises:
        ConfigError: another word.
    """
    global _kernels
    _kernels = _checked(kernels)


def available(device: torch.device | str, kernels: str | None = None) -> tuple[str, str]:
    """("triton" | "reference", reason): what serves the ops on `device` where `kernels` is asked for (default: as `serving` or `use` say).

    Raises:
        UnsupportedError: "triton" is asked for and cannot run there.
        ConfigError: `kernels` is not one of `KERNELS`.
    """
    wanted = _wanted() if kernels is None else _checked(kernels)
    device = torch.device(device)
    if wanted == "reference":
        return "reference", "asked for"
    obstacle = _obstacle(device.type, device.index, wanted)
    if obstacle is None:
        return "triton", "asked for" if wanted == "triton" else f"{device.type} device that Triton supports"
    if wanted == "triton":
        raise UnsupportedError(f"Triton kernels cannot run here: {obstacle}", where=str(device), hint="kernels = 'auto' uses the reference")
    return "reference", obstacle


def attention_family(device: torch.device) -> str:
    """The kernel family that serves long prefill on a device that Triton supports: "hopper" or "triton"."""
    from sparsify.backends.attention import hopper

    return "hopper" if device.type == "cuda" and hopper.ready(device) else "triton"


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


@functools.cache
def _implementation(op: str, kind: str):
    module, function = _IMPLEMENTATIONS[op][kind]
    return getattr(importlib.import_module(module), function)


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    log.warning("%s runs the slow reference: %s", op, reason)


def _serve(op: str):
    # the dispatcher leaves out operands that have their default; kernels get every keyword that is theirs
    schema = getattr(torch.ops.sparsify, op).default._schema.arguments if op != "empty_rows" else ()
    defaults = {a.name: a.default_value for a in schema if a.kwarg_only and a.has_default_value() and a.name not in _FILLED_BY}

    def call(query, *args, **given):
        options = {**defaults, **given}
        kind, _ = available(query.device)
        if kind == "triton":
            try:
                return _implementation(op, "triton")(query, *args, **options)
            except (UnsupportedError, KernelError) as error:
                if not recovers(error):
                    raise
                _warn_once(op, str(error))
        return _implementation(op, "reference")(query, *args, **options)

    return call


def _out_of_memory(error: BaseException | None) -> bool:
    """torch has an error of its own for devices; its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, KernelError):
        return _out_of_memory(error.__cause__)
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


@functools.cache
def _warn_dense() -> None:
    log.warning("select_blocks ran out of memory: every block is visited, so attention is dense (strict = true raises instead)")


def _or_every_block(select: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where there is no memory for an estimate, attention stays dense: right, and slower."""

    @functools.wraps(select)
    def call(query: Tensor, key: Tensor, **options):
        try:
            return select(query, key, **options)
        except (RuntimeError, MemoryError, KernelError) as error:
            if _strict.get() or not _out_of_memory(error):
                raise
        # here the error's frames, and what they hold on the device, are gone
        _warn_dense()
        return every_block(query, key, **options)

    return call


def every_block(
    query: Tensor, key: Tensor, *, query_start: Tensor | None = None, causal: bool, block_size: int, **_: object
) -> tuple[Tensor, Tensor]:
    """Block lists of `select_blocks` that leave out nothing but what causality does; the attention op applies the other clauses."""
    counts, indices = ops.empty_block_lists(query, key, block_size)
    query_len, key_len = query.shape[2], key.shape[2]
    start = key_len - query_len if query_start is None else query_start.reshape(())
    indices.copy_(torch.arange(indices.shape[-1], dtype=indices.dtype, device=indices.device))
    if not causal:
        return counts.fill_(indices.shape[-1]), indices
    return counts.copy_(block_lists.causal_blocks(query_len, key_len, start, block_size, device=query.device)), indices


def register(op: str, kernel: Callable) -> None:
    """Makes a function serve an op on CPU and CUDA devices, outside of the caller's autocast: that would round the products within it."""

    @functools.wraps(kernel)
    def call(*args, **options):
        gradients.refuse(op, args, options)
        with torch._C._DisableAutocast():
            return kernel(*args, **options)

    for device in ("CPU", "CUDA"):
        ops.library.impl(op, call, device)


def offer(op: str, **implementations: tuple[str, str]) -> None:
    """Makes kernels serve an op where Triton is available, else, and where a kernel that fails may be replaced, the reference.

    Args:
        implementations: module and function of `triton` and of `reference`, imported when first called.
    """
    _IMPLEMENTATIONS[op] = implementations
    register(op, _serve(op))


def _filled(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention, and after it what rows that see no key hold."""
    fill = _serve("empty_rows")

    @functools.wraps(attention)
    def filled(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        form = {name: options.pop(name) for name in _FILLED_BY if name in options}
        output, lse = attention(query, key, value, **options)
        if form.get("empty_rows", "zero") != "zero":
            form = {"hidden_bias": None, "lowest": 0.0} | form
            fill(output, lse, query, key, value, options=dict.fromkeys(_OPERANDS) | options, **form)
        return output, lse

    return filled


attend = _filled(_serve("attention"))
select_blocks = _or_every_block(_serve("select_blocks"))

register("attention", attend)
register("select_blocks", ops.observed_selection(select_blocks))
