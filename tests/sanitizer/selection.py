"""Calls of block selection's kernels for compute-sanitizer. `run` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsify.backends.select import patterns_triton, stages
from sparsify.backends.select import triton as triton_select
from sparsify.ops.estimate import EXAMPLES, Estimate
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.selection import SelectCall
from sparsify.passes.xattention import XAttention

AT_ONCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged, stride 8": {"length": 505, "stride": 8},
    **{str(one): {"estimate": one, "length": 505 if one.int8 else 512} for one in EXAMPLES},
    "group, density": {"pool": "sum", "estimate": Estimate(group=True), "density": 0.3},
    "flags, window": {"flags": True, "windows": (300,)},
    "wide": {"wide": True},
    "row": {"pool": "row", "stride": 8, "length": 505},
}
_ONE = {"length": 1024, "pool": "row", "stride": 4, "estimate": Estimate(merge=4, int8=True)}
_BY_DEFAULT = XAttention()
_TWO = {name: getattr(_BY_DEFAULT, name) for name in ("pool", "stride", "refine_stride", "coarse_threshold", "min_share")}
_TWO |= {"length": 1024, "estimate": _BY_DEFAULT.variants, "threshold": (0.8,)}
# whose query cells stay while keys pass by: one stage over 8 bits, and two stages
PASSING: dict[str, dict[str, Any]] = {
    "one stage": _ONE,
    "one stage, ragged, least share": {**_ONE, "length": 1001, "min_share": 0.05},
    "one stage, flags, highest": {**_ONE, "estimate": Estimate(merge=2, int8=True, peak=True), "flags": True, "length": 512},
    "two stages": _TWO,
    "two stages, ragged": {**_TWO, "length": 1001},
    "two stages, a chunk, 8 bits": {**_TWO, "estimate": Estimate(merge=2, int8=True), "key_len": 1801},
    "two stages, more rows than keys": {**_TWO, "key_len": 300},
    "two stages, a threshold of 1": {**_TWO, "threshold": (0.5, 1.0, 0.5, 0.8)},
}
_HEADS = {"columns": (5, 1, 0, 2), "diagonals": (2, 1, 3, 0)}
PATTERNS: dict[str, dict[str, Any]] = {
    "columns and distances": _HEADS,
    "ragged chunk, mass": {**_HEADS, "length": 401, "key_len": 1801, "mass": 0.8},
    "flags": {**_HEADS, "flags": True},
    "by block, divergence": {**_HEADS, "blocks": (0, 2, 0, 3), "divergence": 0.2, "mass": 0.8},
}


def _operands(device: str, length: int, key_len: int, flags: bool) -> dict[str, torch.Tensor]:
    draw = lambda heads, rows: torch.randn(2, heads, rows, 128, device=device, dtype=torch.bfloat16)
    given = {"query": draw(4, length), "key": draw(2, key_len)}
    if flags:
        given["key_flags"] = (torch.arange(key_len, device=device) >= torch.tensor([[0], [333]], device=device)).to(torch.uint8)
    return given


def blocks(device: str, *, length: int = 512, key_len: int = 0, flags: bool = False, wide: bool = False, **options: Any) -> None:
    limits = triton_select.Limits(fused_width=1, part=64) if wide else triton_select.LIMITS
    given = {"scale": 0.5, "causal": True, "stride": 16, "threshold": (0.9,), **options}
    call = SelectCall(**_operands(device, length, key_len or length, flags), **given)
    call.check()
    stages.select_blocks(call, limits=limits)


def pattern(device: str, *, length: int = 1024, key_len: int = 0, flags: bool = False, **options: Any) -> None:
    call = SelectPatternCall(**_operands(device, length, key_len or length, flags), scale=0.1, **options)
    call.check()
    patterns_triton.select_pattern(call)


FAMILIES = {"select": (blocks, AT_ONCE), "passing": (blocks, PASSING), "pattern": (pattern, PATTERNS)}


def cases(serve: Callable[..., None], table: dict[str, dict[str, Any]], device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, options in table.items():
        yield name, lambda options=options: serve(device, **options)
