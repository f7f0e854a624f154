"""Checks the operands of `sparsify::attention` and runs it: by the reference, or by a kernel generated for the call."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention import reference
from sparsify.backends.attention.triton_source import AttentionSpec, Tiling, arguments, attention_source, choose_tiling, programs
from sparsify.backends.codegen import source
from sparsify.errors import KernelError, SparsifyError, UnsupportedError
from sparsify.ops.attention import empty_output
from sparsify.releases import triton_release

_WHERE = "sparsify::attention"
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# a call with at most this many (query, head of a group) rows shares one tile among the heads of a group
_PACKED_QUERIES, _PACKED_ROWS = 16, 128
_LONGEST_WINDOW = 1 << 30
_OPERANDS = ("key_flags", "segments", "query_start", "block_counts", "block_indices", "sink_logits", "alibi_slopes", "key_bias")
_BROADCAST = ("key_flags", "segments", "alibi_slopes", "key_bias")  # one batch row serves all
_LOG2E = math.log2(math.e)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, *, into: tuple[Tensor, Tensor] | None = None, **options
) -> tuple[Tensor, Tensor]:
    """`reference.attention` on checked operands."""
    check_operands(query, key, value, **options)
    return reference.attention(query, key, value, into=into, **options)


def check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_flags: Tensor | None = None,
    segments: Tensor | None = None,
    query_start: Tensor | None = None,
    block_counts: Tensor | None = None,
    block_indices: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float,
    causal: bool,
    windows: list[int],
    sinks: int,
    softcap: float,
    block_size: int,
    seq_major: bool,
    version: int,
) -> None:
    """Raises UnsupportedError, saying what is wrong, unless the operands fit together as `sparsify.ops.attention` says."""

    def need(holds: bool, what: str, hint: str = "") -> None:
        if not holds:
            raise UnsupportedError(what, where=_WHERE, hint=hint)

    need(query.dim() == key.dim() == value.dim() == 4, "query, key and value must have 4 dimensions", "[batch, heads, length, head_dim]")
    (batch, heads, query_len, dim), (_, kv_heads, key_len, _) = query.shape, key.shape
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    need(
        key.shape[0] == value.shape[0] == batch and value.shape[1:3] == key.shape[1:3] and key.shape[3] == dim,
        f"shapes do not fit: {shapes}",
    )
    need(kv_heads > 0 and heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} KV heads")
    dtypes = {query.dtype, key.dtype, value.dtype}
    need(
        len(dtypes) == 1 and query.is_floating_point(),
        f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}",
        "one float dtype",
    )
    need(len(windows) in (0, 1, heads) and all(w >= 0 for w in windows), f"{len(windows)} windows {windows[:4]} for {heads} query heads")
    need(softcap >= 0 and math.isfinite(scale), f"softcap {softcap}, scale {scale}", "a softcap is positive or 0 for none")
    need((block_counts is None) == (block_indices is None), "block_counts and block_indices come together")
    expected = {
        "key_flags": (key_flags, (batch, key_len), False),
        "segments": (segments, (batch, key_len), False),
        "sink_logits": (sink_logits, (heads,), True),
        "alibi_slopes": (alibi_slopes, (batch, heads), True),
    }
    if block_counts is not None:
        need(block_size > 0, f"block size {block_size}")
        lists = (batch, heads, -(-query_len // block_size))
        expected["block_counts"] = (block_counts, lists, False)
        need(block_indices.dim() == 4, f"block_indices have {block_indices.dim()} dimensions, not 4")
        expected["block_indices"] = (block_indices, (*lists, block_indices.shape[-1]), False)
    if key_bias is not None:
        shape = (batch, heads if key_bias.dim() != 3 or key_bias.shape[1] != 1 else 1, key_len)
        expected["key_bias"] = (key_bias, shape, True)
    for name, (operand, shape, floating) in expected.items():
        if operand is None:
            continue
        found = tuple(operand.shape)
        fits = found == shape or (found[:1] == (1,) and found[1:] == shape[1:] and name in _BROADCAST)
        need(fits, f"{name} is {found}, not {shape}")
        need(operand.is_floating_point() == floating, f"{name} is {operand.dtype}", "floating point" if floating else "integers")
        need(operand.device == query.device, f"{name} is on {operand.device}, query on {query.device}")
    if query_start is not None:
        need(
            query_start.numel() == 1 and not query_start.is_floating_point(),
            f"query_start is {tuple(query_start.shape)} {query_start.dtype}",
            "one integer",
        )
    need(key.device == value.device == query.device, f"query, key and value are on {query.device}, {key.device} and {value.device}")


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tiling: Tiling | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """The op by a generated kernel.

    Args:
        tiling: instead of the table's choice, for tests and tuning.
        into: output and LSE to fill instead of new ones; the LSE contiguous.

    Raises:
        UnsupportedError: no kernel takes this call, or its operands do not fit together.
        KernelError: the kernel could not be compiled or launched.
    """
    check_operands(query, key, value, **options)
    # the dispatcher leaves out operands that have their default
    options = dict.fromkeys(_OPERANDS) | options
    output, lse = into or (
        empty_output(query, value, options["seq_major"]),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    )
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    spec = _spec(query, key, value, options, tiling)
    values = _values(spec, query, key, value, output, lse, options)
    grid = (programs(spec, query.shape[0], key.shape[1], query.shape[2]),)
    try:
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            launch = _kernel(spec)[grid]
            launch(*(values[argument.name] for argument in arguments(spec)), num_warps=spec.tiling.warps, num_stages=spec.tiling.stages)
    except SparsifyError:
        raise
    except Exception as error:
        raise _failure(spec, error) from error
    return output, lse


def _spec(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], tiling: Tiling | None) -> AttentionSpec:
    """The kernel that a call needs; clauses that change nothing for it are left out."""
    heads, query_len, qk_head_dim = query.shape[1:]
    group = heads // key.shape[1]
    if query.dtype not in _DTYPES or options["scale"] <= 0:
        raise UnsupportedError(
            f"no attention kernel takes {query.dtype} with scale {options['scale']}", where=_WHERE, hint="the reference does"
        )
    dtype, lists = _DTYPES[query.dtype], options["block_counts"] is not None
    packed = not lists and query_len <= _PACKED_QUERIES and query_len * group <= _PACKED_ROWS
    if tiling is None:
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
        blocks, rows = options["block_size"] * lists, query_len * group * packed
        segments = options["segments"] is not None
        tiling = _tiling(dtype, qk_head_dim, value.shape[-1], capability, block_size=blocks, packed_rows=rows, segments=segments)
    window = _window_mode(options["windows"])
    flags, start = options["key_flags"] is not None, options["query_start"] is not None
    counted = "count" if options["sinks"] > 0 else "none"
    return AttentionSpec(
        dtype=dtype,
        qk_head_dim=qk_head_dim,
        v_head_dim=value.shape[-1],
        group=group,
        tiling=tiling,
        # the last row sees every key when it stands on the last one
        causal=options["causal"] and (query_len > 1 or start),
        window=window,
        sinks="none" if window == "none" else "flags" if flags else counted,
        key_flags=flags,
        segments=options["segments"] is not None,
        has_start=start,
        block_lists=lists,
        block_size=options["block_size"] if lists else 0,
        softcap=options["softcap"] > 0,
        alibi=options["alibi_slopes"] is not None,
        key_bias=options["key_bias"] is not None,
        sink_logits=options["sink_logits"] is not None,
        packed=packed,
    )


_tiling = functools.cache(choose_tiling)


def _window_mode(windows: list[int]) -> str:
    if not any(windows):
        return "none"
    return "one" if len(set(windows)) == 1 else "per_head"


def _values(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """Kernel arguments by name."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    values: dict[str, Any] = {"query": query, "key": key, "value": value, "out": output, "lse": lse}
    for name, axes in (("query", "bhm"), ("key", "bhn"), ("value", "bhn"), ("out", "bhm")):
        values |= {f"{name}_{axis}": stride for axis, stride in zip(axes, values[name].stride())}
    values |= {"kv_heads": key.shape[1], "query_len": query.shape[2], "key_len": key.shape[2]}
    scale, cap = options["scale"], options["softcap"]
    values["scale"] = scale * _LOG2E
    if spec.softcap:
        values |= {"tanh_scale": 2 * _LOG2E * scale / cap, "cap_log2": cap * _LOG2E}
    if spec.has_start:
        values["query_start"] = options["query_start"].to(query.device, torch.int64)
    if spec.window != "none":
        windows = tuple(min(window, _LONGEST_WINDOW) for window in options["windows"])
        values |= {"window": windows[0], "sinks": options["sinks"]}
        if spec.window == "per_head":
            values["windows"] = _on_device(windows, query.device)
    if spec.key_flags:
        flags = options["key_flags"].to(torch.uint8).contiguous()
        values |= {"key_flags": flags, "flags_b": _batch_stride(flags), "flag_bounds": _flag_bounds(flags, query.shape[0])}
    if spec.segments:
        segments = options["segments"].to(torch.int32).contiguous()
        values |= {"segments": segments, "segments_b": _batch_stride(segments)}
    if spec.block_lists:
        lists = query.shape[:2]
        counts = options["block_counts"].to(torch.int32).expand(*lists, -1).contiguous()
        indices = options["block_indices"].to(torch.int16).expand(*lists, -1, -1).contiguous()
        values |= {"block_counts": counts, "block_indices": indices, "list_len": indices.shape[-1]}
    if spec.alibi:
        slopes = options["alibi_slopes"].to(torch.float32).contiguous()
        values |= {"alibi_slopes": slopes, "alibi_b": _batch_stride(slopes)}
    if spec.key_bias:
        bias = options["key_bias"].to(torch.float32).contiguous()
        values |= {"key_bias": bias, "bias_b": _batch_stride(bias), "bias_h": 0 if bias.shape[1] == 1 else bias.stride(1)}
    if spec.sink_logits:
        values["sink_logits"] = options["sink_logits"].to(torch.float32).contiguous()
    return values


def _batch_stride(operand: Tensor) -> int:
    """One batch row serves all."""
    return 0 if operand.shape[0] == 1 else operand.stride(0)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _flag_bounds(flags: Tensor, batch: int) -> Tensor:
    """int32 [batch, 4]: first real key, one past the last, first sink, one past the last; empty ranges are (key_len, 0)."""
    key = torch.arange(flags.shape[1], dtype=torch.int32, device=flags.device)
    bounds = []
    for bits in (1, 3):
        present = flags & bits == bits
        bounds += [torch.where(present, key, flags.shape[1]).amin(-1), torch.where(present, key + 1, 0).amax(-1)]
    return torch.stack(bounds, -1).to(torch.int32).expand(batch, 4).contiguous()


@functools.lru_cache(maxsize=1024)
def _kernel(spec: AttentionSpec) -> Callable[..., Any]:
    return source.load(attention_source(spec, triton_release()), "attention").attention


def _failure(spec: AttentionSpec, error: Exception) -> KernelError:
    lines = str(error).strip().splitlines() or [""]
    hint = "kernels = 'reference' computes the same; please report the line above"
    return KernelError(f"{type(error).__name__}: {lines[-1]}", where=f"attention kernel ({spec.describe()}; {spec.tiling})", hint=hint)
