"""Runs `sparsify::attention` on Hopper by generated Gluon, for the calls that it serves; says why not for the others.

Compute capability decides, never a device's name; and Gluon is experimental, so only Triton releases that were tried are used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention.hopper_source import DIALECTS, QUERY_TILE, GluonSpec, GluonTuning, arguments, generate
from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import DTYPES, LOG2E, LONGEST_WINDOW, capability, launching, meant, on_device, processors
from sparsify.backends.codegen.launch import launch as launch_kernel
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import HOPPER, cdiv
from sparsify.releases import triton_release

log = logging.getLogger(__name__)

# the op's arguments that the kernel knows; a call with another one is not served
_SERVES = {
    "key_flags", "segments", "query_start", "block_counts", "block_indices", "sink_logits", "windows", "sinks", "softcap", "block_size",
}  # fmt: skip
_LAUNCH = {"num_warps": 4, "maxnreg": 168}  # 384 threads at 168 registers; setmaxnreg hands them out anew
_ROWS_FIRST_BYTES = 24 << 20  # K and V of all heads together stay in half of Hopper's 50 MB of L2


def serves(call: AttentionCall, capability: tuple[int, int], triton_release: tuple[int, int]) -> str | None:
    """Why this call is not served; None when it is.

    Args:
        call: checked already.
        capability: of the device. triton_release: major and minor number.
    """
    query, key = call.query, call.key
    batch, heads, query_len, head_dim = query.shape
    unserved = HOPPER.obstacle(query.dtype, (head_dim, call.value.shape[-1]))
    others = call.beyond(_SERVES)
    obstacles = {
        f"compute capability {capability[0]}.{capability[1]} is not {HOPPER.capability}.x": capability[0] != HOPPER.capability,
        f"Triton {triton_release[0]}.{triton_release[1]} was not tried": triton_release not in DIALECTS,
        str(unserved): unserved is not None,
        f"{query_len} query rows are few": query_len < HOPPER.min_query_len,
        "no keys": key.shape[2] == 0 or query.numel() == 0,
        f"lists of {call.block_size}-key blocks": call.listed and call.block_size != HOPPER.block_size,
        ", ".join(others): bool(others),
        f"scale {call.scale}": call.scale <= 0,
        "too many tiles": batch * heads * cdiv(query_len, QUERY_TILE) >= 1 << 30,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def ready(device: torch.device) -> bool:
    """Whether Hopper kernels can run on a device at all: its capability, and a Triton release that was tried; others are logged once."""
    if meant(device).type != "cuda" or torch.version.hip is not None or capability(device)[0] != HOPPER.capability:
        return False
    if triton_release() not in DIALECTS:
        _log_release(triton_release())
    return triton_release() in DIALECTS


def obstacle(call: AttentionCall) -> str | None:
    """`serves` for the device that the operands are on and the Triton that is installed."""
    device = call.query.device
    if meant(device).type != "cuda" or torch.version.hip is not None:
        return "no NVIDIA GPU"
    return serves(call, capability(device), triton_release())


def attention(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The op by the Gluon kernel.

    Args:
        into: output and LSE to fill instead of new ones; the LSE contiguous.

    Raises:
        UnsupportedError: why the kernel does not take this call.
        KernelError: the kernel could not be compiled or launched.
    """
    if (reason := obstacle(call)) is not None:
        raise UnsupportedError(reason, where="Hopper attention", hint="the plain Triton kernel may take it")
    return launch(call, into=into)


def launch(call: AttentionCall, *, tuning: GluonTuning | None = None, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call that `serves` accepts. Asynchronous, without host synchronisation; a CUDA graph can capture it.

    Args:
        tuning: instead of the table's choice, for tests and tuning. into: output and LSE to fill instead of new ones.

    Raises:
        KernelError: the kernel could not be compiled or launched.
    """
    output, lse = into or call.empty_outputs()
    spec, query = make_spec(call, tuning), call.query
    batch, heads, query_len = query.shape[:3]
    tiles = cdiv(query_len, QUERY_TILE) * batch * heads
    with launching(query.device, lambda: f"Hopper attention kernel ({spec.describe()}; {spec.tuning})"):
        values = operands(spec, call, lse) | _descriptors(spec, call, output)
        grid = (min(processors(query.device), tiles),)
        launch_kernel(_kernel(spec, triton_release()), grid, arguments(spec), values, **_LAUNCH)
    return output, lse


def make_spec(call: AttentionCall, tuning: GluonTuning | None = None) -> GluonSpec:
    """The spec of a call, with the table's tuning unless one is given."""
    query, key, value, windows = call.query, call.key, call.value, call.windows
    flags, segments = call.key_flags is not None, call.segments is not None
    head_dim, value_dim = _padded(query.shape[-1]), _padded(value.shape[-1])
    if tuning is None:
        kept = key.shape[0] * key.shape[1] * key.shape[2] * (key.shape[3] + value.shape[3]) * key.element_size()
        many, lists = flags or segments or call.windowed, call.listed
        tuning = choose_tuning(head_dim, value_dim, many, kept <= _ROWS_FIRST_BYTES, lists, triton_release())
    return GluonSpec(
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        value_dim=value_dim,
        causal=call.causal,
        lists=call.listed,
        windows="none" if not call.windowed else "one" if len(set(windows)) == 1 else "heads",
        sinks=call.windowed and call.sinks > 0 and not flags,
        key_flags=flags,
        segments=segments,
        start=call.query_start is not None,
        softcap=call.softcap > 0,
        sink_logits=call.sink_logits is not None,
        tuning=tuning,
    )


@functools.cache
def choose_tuning(
    head_dim: int, value_dim: int, many_clauses: bool, cached: bool, lists: bool = False, release: tuple[int, int] = (3, 6)
) -> GluonTuning:
    """The table of tunings.

    Args:
        many_clauses: key flags, segments or windows, whose walk needs more registers in the producer.
        cached: K and V of all heads fit in the L2 cache together, so that the order of tiles is free to balance the load.
        lists: block lists, which leave a tile few blocks; its last V then comes a turn earlier.
        release: of Triton. From 3.9 on it has no registers left for the queries.
    """
    order = "rows" if cached else "heads"
    registers = (232, 40) if many_clauses or max(head_dim, value_dim) == 256 else (240, 24)
    common = GluonTuning(order=order, consumer_registers=registers[0], producer_registers=registers[1])
    if max(head_dim, value_dim) == 256:
        return replace(common, key_tile=64, query_stages=1, output_in_query=head_dim == value_dim)
    common = replace(common, query_registers=not many_clauses and release < (3, 9))
    if head_dim == value_dim == 64:
        return replace(common, key_stages=4, value_stages=4)
    if head_dim == value_dim:  # the query's slot takes the output, and a third V stage its room: 1 to 4 % on an H200, dense and sparse
        return replace(common, output_in_query=True, value_stages=3, value_delay=0 if lists else 1)
    return common


def _padded(dim: int) -> int:
    """The kernel's width for a head dim: the copy engine fills columns past the tensor's end with zeros, and clips them on the way out."""
    return next(width for width in (64, 128, 256) if width >= dim)


@functools.cache
def _log_release(release: tuple[int, int]) -> None:
    tried = ", ".join(f"{major}.{minor}" for major, minor in DIALECTS)
    log.warning("Triton %d.%d was not tried with the Hopper kernels (tried: %s): the plain Triton kernels serve", *release, tried)


@functools.lru_cache(maxsize=1024)
def _kernel(spec: GluonSpec, release: tuple[int, int]) -> Callable[..., Any]:
    return source.load(generate(spec, release), "gluon_attention").attention


def operands(spec: GluonSpec, call: AttentionCall, lse: Tensor) -> dict[str, Any]:
    """The kernel's arguments but for the descriptors, by name, and perhaps some that this spec has no use for."""
    query, key = call.query, call.key
    batch, heads, query_len, _ = query.shape
    kv_heads, key_len = key.shape[1:3]
    device, tile = query.device, spec.tuning.key_tile
    values: dict[str, Any] = {
        "lse": lse,
        # of this launch alone, so that launches on several streams never draw from one counter
        "counter": torch.zeros(1, dtype=torch.int32, device=device),
        "query_len": query_len,
        "key_len": key_len,
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "start": key_len - query_len,
        "scale": call.scale * LOG2E,
    }
    if spec.softcap:
        values |= {"scale": 2 * LOG2E * call.scale / call.softcap, "cap": call.softcap * LOG2E}
    if call.query_start is not None:
        values["starts"] = call.query_start.to(device, torch.int64)
    if call.block_counts is not None and call.block_indices is not None:
        values["counts"] = call.block_counts.to(torch.int32).contiguous()
        values["indices"] = call.block_indices.to(torch.int16).contiguous()
        values["list_len"] = values["indices"].shape[-1]
    if spec.windows != "none":
        windows = tuple(min(window, LONGEST_WINDOW) for window in call.windows)
        values |= {"window": windows[0], "sinks": min(call.sinks, key_len)}
        if spec.windows == "heads":
            values["windows"] = on_device(windows, device)
    if call.key_flags is not None:
        flags = call.key_flags.to(torch.uint8)
        values |= {"flags": _rows(_padded_row(flags, tile), batch)} | {name: _rows(t, batch) for name, t in flag_tiles(flags, tile).items()}
    if call.segments is not None:
        segments = call.segments.to(torch.int32)
        values |= {"segments": _rows(_padded_row(segments, tile), batch)} | {
            name: _rows(t, batch) for name, t in segment_tiles(segments, tile).items()
        }
    if call.sink_logits is not None:
        values["sink_logits"] = call.sink_logits.to(torch.float32).contiguous()
    return values


def flag_tiles(flags: Tensor, tile: int) -> dict[str, Tensor]:
    """What a whole key tile's flags say, for a producer that skips or trusts tiles.

    Args:
        flags: uint8 [rows, key_len], the op's key_flags.

    Returns:
        flag_tiles: uint8 [rows, tiles]; 1: some key is visible, 2: every key is, 4: some visible key is a sink.
        sink_tiles: int32 [rows], tiles up to the last one that has a sink.
    """
    rows, key_len = flags.shape
    tiles = cdiv(key_len, tile)
    tiled = torch.nn.functional.pad(flags & 3, (0, tiles * tile - key_len)).view(rows, tiles, tile)
    visible, sink = tiled & 1, (tiled == 3).to(torch.uint8)
    has_sink = sink.amax(-1)
    numbers = torch.arange(1, tiles + 1, dtype=torch.int32, device=flags.device)
    return {
        "flag_tiles": visible.amax(-1) + 2 * visible.amin(-1) + 4 * has_sink,
        "sink_tiles": (has_sink * numbers).amax(-1).to(torch.int32),
    }


def segment_tiles(segments: Tensor, tile: int) -> dict[str, Tensor]:
    """Lowest and highest segment of each key tile, int32 [rows, tiles], of int32 segments [rows, key_len]."""
    rows, key_len = segments.shape
    tiles = cdiv(key_len, tile)
    # the last key stands in for those past the end
    tiled = torch.cat([segments, segments[:, -1:].expand(rows, tiles * tile - key_len)], 1).view(rows, tiles, tile)
    return {"segment_low": tiled.amin(-1), "segment_high": tiled.amax(-1)}


def _padded_row(operand: Tensor, tile: int) -> Tensor:
    """Zeros up to the end of the tile after the last: the kernel reads whole tiles, and that one where a row tile sees nothing."""
    key_len = operand.shape[1]
    return torch.nn.functional.pad(operand, (0, (cdiv(key_len, tile) + 1) * tile - key_len))


def _rows(operand: Tensor, batch: int) -> Tensor:
    """One row a batch row; a single one serves all."""
    return operand.expand(batch, *operand.shape[1:]).contiguous()


def _descriptors(spec: GluonSpec, call: AttentionCall, output: Tensor) -> dict[str, Any]:
    return {
        "queries": _descriptor(call.query, QUERY_TILE // 2, spec.head_dim),
        "keys": _descriptor(call.key, spec.tuning.key_tile, spec.head_dim),
        "values": _descriptor(call.value, spec.tuning.key_tile, spec.value_dim),
        "outputs": _descriptor(output, QUERY_TILE // 2, spec.value_dim),
    }


def _descriptor(tensor: Tensor, rows: int, columns: int):
    """A descriptor for tiles of `rows` by `columns` of one head of [batch, heads, length, dim]."""
    if not copyable(tensor):
        tensor = tensor.contiguous()
    kind, fields = _descriptor_fields(tuple(tensor.shape), tensor.stride(), tensor.dtype, rows, columns)
    descriptor = object.__new__(kind)  # its fields were checked when they were made, and `copyable` checks the address
    descriptor.__dict__.update(fields, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=1024)
def _descriptor_fields(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int):
    """The descriptor's class and all its fields but the tensor: checking them takes longer than a short prompt's attention."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # the stride of a dimension of size one is never used, yet must be a multiple of 16 bytes
    valid = [8 * columns if size == 1 and i < 3 else stride for i, (size, stride) in enumerate(zip(shape, strides))]
    like = torch.empty(0, dtype=dtype)
    return TensorDescriptor, dict(vars(TensorDescriptor(like, list(shape), valid, [1, 1, rows, columns], layout)))


def copyable(tensor: Tensor) -> bool:
    """Whether the copy engine takes the layout as it is: rows contiguous, everything at multiples of 16 bytes, nothing expanded."""
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3]) if size > 1]
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)
