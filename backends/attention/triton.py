"""Runs `sparsify::attention` by a kernel that is generated for the call."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention.triton_source import (
    AttentionSpec,
    AttentionTiling,
    arguments,
    attention_source,
    combine_arguments,
    make_spec,
    packed,
    programs,
)
from sparsify.backends.cache.kernels import partial_sums
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import argument_values
from sparsify.backends.codegen.launch import choose_splits, launch, launching, power_of_two, processors, stride_values
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv
from sparsify.releases import triton_release

_WHERE = "sparsify::attention"
# fewer keys than this are not worth a second launch; tiles of so many keys are shared out
_LEAST_SPLIT_KEYS, _SPLIT_TILE = 1024, 64


def triton_attention(
    call: AttentionCall, *, tiling: AttentionTiling | None = None, splits: int | None = None, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The op by a generated kernel.

    Args:
        tiling: instead of the table's choice, for tests and tuning.
        splits: parts of the keys that programs of their own compute, for calls with few queries; None: as many as fill the device.
        into: output and LSE to fill instead of new ones; the LSE contiguous.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: the kernel could not be compiled or launched.
    """
    query, key = call.query, call.key
    output, lse = into or call.empty_outputs()
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    splits = _splits(call) if splits is None else splits
    spec = make_spec(call, tiling, splits > 1)
    values = _values(spec, call, output, lse)
    rows, group_rows = query.shape[0] * key.shape[1], query.shape[2] * spec.group
    if spec.split_keys:
        values |= partial_sums(rows * group_rows * splits, call.value.shape[-1], query.device)
        values |= {"splits": splits, "SPLITS": max(2, power_of_two(splits))}
    grid = (programs(spec, query.shape[0], key.shape[1], query.shape[2]) * splits,)
    with launching(query.device, lambda: f"attention kernel ({spec.describe()}; {spec.tiling})"):
        module = _module(spec)
        kernel = module.split if spec.split_keys else module.attention
        launch(kernel, grid, arguments(spec), values, num_warps=spec.tiling.warps, num_stages=spec.tiling.stages)
        if spec.split_keys:
            launch(module.combine, (group_rows, rows), combine_arguments(spec), values, num_warps=4)
    return output, lse


def _splits(call: AttentionCall) -> int:
    """Parts of the keys that fill the device once, from shapes alone, so that a CUDA graph serves whatever length is read on the device."""
    batch, kv_heads, key_len, _ = call.key.shape
    if not packed(call) or key_len < _LEAST_SPLIT_KEYS:
        return 1
    tiles, rows, at_once = cdiv(key_len, _SPLIT_TILE), batch * kv_heads, 2 * processors(call.query.device)
    # `combine` is compiled for a power of two: 33 would cost twice the registers, and a kernel more as a cache grows
    return choose_splits(tiles, rows, at_once, 32 if at_once // rows < 40 else 128)


def _values(spec: AttentionSpec, call: AttentionCall, output: Tensor, lse: Tensor) -> dict[str, Any]:
    """Kernel arguments by name."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (call.query, call.key, call.value))
    values: dict[str, Any] = {"query": query, "key": key, "value": value, "out": output, "lse": lse}
    values |= stride_values(query=(query, "bhm"), key=(key, "bhn"), value=(value, "bhn"), out=(output, "bhm"))
    return values | argument_values((*arguments(spec), *combine_arguments(spec)), call)


@functools.lru_cache(maxsize=1024)
def _module(spec: AttentionSpec) -> ModuleType:
    return source.load(attention_source(spec, triton_release()), "attention")
