"""From a spec of one attention call to the text of a Triton kernel that has exactly its clauses. Needs neither a GPU nor Triton.

The forward pass is FlashAttention's (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691): one program owns a tile of query
rows and folds key tiles into a running softmax in base 2. Key tiles that every row of the tile sees run without mask arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention.split_template import COMBINE
from sparsify.backends.attention.triton_template import FOLD_TILE, KERNEL
from sparsify.backends.codegen.arguments import (
    ITEM_BYTES,
    Argument,
    check_head_dims,
    constexprs,
    floats,
    head_dim_values,
    integers,
    padded,
    parameters,
    pointers,
    present,
    unspecialised,
)
from sparsify.backends.codegen.launch import DTYPES, LOG2E, LONGEST_WINDOW, broadcast_stride, capability, on_device
from sparsify.backends.codegen.template import header, render
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv

_WHERE = "sparsify::attention"
# a call with at most this many (query, head of a group) rows shares one tile among the heads of a group
_PACKED_QUERIES, _PACKED_ROWS = 16, 128
# the op's arguments that the kernel knows; a call with another one is not served
_SERVES = {
    "key_flags", "segments", "query_start", "block_counts", "block_indices", "sink_logits", "alibi_slopes", "bias", "windows", "sinks",
    "softcap", "block_size",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionTiling:
    """queries, keys: rows of a query tile and of a key tile. warps, stages: Triton's launch options.

    edge_keys: rows of a key tile that needs the mask; few, because masking a large tile takes more registers than there are.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    edge_keys: int = 32


@dataclass(frozen=True)
class AttentionSpec:
    """What decides the kernel's text; numbers that may differ between calls of one kernel are its arguments.

    group: query heads per KV head.
    window: "none", "one" (the same for all heads) or "per_head" (a tensor; 0 = none for that head).
    sinks: keys that a window does not hide: "none", "count" (the first ones) or "flags" (bit 1 of key_flags).
    has_start: the position of the first query row is read from a tensor; otherwise it is key_len - query_len.
    key_bias: each key has a bias, whatever the row. bias: each row has its own for each key, in this dtype; "" without.
    packed: a tile's rows are (query, head of the group) pairs, for calls with few queries.
    split_keys: keys are shared out among programs, whose partial results a second kernel joins; only for packed calls.
    uniform: every row of a tile sees the same keys, as those of a single query do; only for split calls.
    """

    dtype: str
    qk_head_dim: int
    v_head_dim: int
    group: int
    tiling: AttentionTiling
    causal: bool = True
    window: str = "none"
    sinks: str = "none"
    key_flags: bool = False
    segments: bool = False
    has_start: bool = False
    block_lists: bool = False
    block_size: int = 0
    softcap: bool = False
    alibi: bool = False
    key_bias: bool = False
    bias: str = ""
    sink_logits: bool = False
    packed: bool = False
    split_keys: bool = False
    uniform: bool = False

    def __post_init__(self):
        check_head_dims(_WHERE, self.qk_head_dim, self.v_head_dim)
        impossible = {
            f"dtype {self.dtype}": self.dtype not in ITEM_BYTES,
            f"window {self.window!r}": self.window not in ("none", "one", "per_head"),
            "sinks without a window": self.sinks != "none" and self.window == "none",
            "sinks by flags without flags": self.sinks == "flags" and not self.key_flags,
            "counted sinks beside flags": self.sinks == "count" and self.key_flags,
            "block lists for packed heads": self.block_lists and self.packed,
            "split keys for unpacked heads": self.split_keys and not self.packed,
            "a uniform tile of unsplit keys": self.uniform and not self.split_keys,
            "a uniform tile with a window per head": self.uniform and self.window == "per_head",
            f"blocks of {self.block_size} with tiles of {self.tiling.queries} x {self.tiling.keys}": self.block_lists
            and any(self.block_size % tile for tile in (self.tiling.queries, self.tiling.keys, self.tiling.edge_keys)),
        }
        for what, wrong in impossible.items():
            if wrong:
                raise UnsupportedError(f"no attention kernel has {what}", where=_WHERE)

    def describe(self) -> str:
        """One line: `bf16, head dim 128, 4 query heads per KV head; causal, window, sinks`."""
        dims = f"{self.qk_head_dim}" if self.qk_head_dim == self.v_head_dim else f"{self.qk_head_dim} and {self.v_head_dim}"
        clauses = {
            "causal": self.causal,
            "start from a tensor": self.has_start,
            "window": self.window == "one",
            "window per head": self.window == "per_head",
            "sinks": self.sinks != "none",
            "key flags": self.key_flags,
            "segments": self.segments,
            f"lists of {self.block_size}-key blocks": self.block_lists,
            "softcap": self.softcap,
            "ALiBi": self.alibi,
            "bias per key": self.key_bias,
            f"{self.bias} bias": bool(self.bias),
            "sink logits": self.sink_logits,
            "packed heads": self.packed,
            "split keys": self.split_keys,
        }
        named = ", ".join(name for name, present in clauses.items() if present)
        return f"{self.dtype}, head dim {dims}, {self.group} query heads per KV head; {named or 'every key visible'}"


PARTS = ("part_m", "part_l", "part_acc")


@functools.lru_cache(maxsize=512)
def arguments(spec: AttentionSpec) -> tuple[Argument, ...]:
    """The kernel's arguments in order. Those that follow from a call's record say how; the launch adds operands, outputs and strides."""
    strided = (("query", "bhm"), ("key", "bhn"), ("value", "bhn"), *(() if spec.split_keys else (("out", "bhm"),)))
    aligned = functools.partial(integers, aligned=True)
    return (
        *pointers(spec.dtype, *(name for name, _ in strided)),
        *pointers("fp32", *(PARTS if spec.split_keys else ("lse",))),
        *aligned(*(f"{name}_{axis}" for name, axes in strided for axis in axes)),
        *_lengths(spec),
        *(
            (
                *_valued(floats("tanh_scale"), lambda call: 2 * LOG2E * call.scale / call.softcap),
                *_valued(floats("cap_log2"), lambda call: call.softcap * LOG2E),
            )
            if spec.softcap
            else _valued(floats("scale"), lambda call: call.scale * LOG2E)
        ),
        *present(
            (spec.has_start, _start()),
            (spec.window == "one", _valued(aligned("window"), lambda call: min(call.windows[0], LONGEST_WINDOW))),
            (spec.window == "per_head", _valued(pointers("i32", "windows"), _windows)),
            (spec.sinks == "count", _valued(integers("sinks"), lambda call: call.sinks)),
            (spec.key_flags, _valued(pointers("u8", "key_flags"), _key_flags)),
            (spec.key_flags, _valued(aligned("flags_b"), lambda call: _batch_stride(call.key_flags))),
            (bounded(spec), _valued(pointers("i32", "flag_bounds"), lambda call: _flag_bounds(_key_flags(call), call.query.shape[0]))),
            (spec.segments, _valued(pointers("i32", "segments"), lambda call: call.segments.to(torch.int32).contiguous())),
            (spec.segments, _valued(aligned("segments_b"), lambda call: _batch_stride(call.segments))),
            (spec.block_lists, _valued(pointers("i32", "block_counts"), lambda call: _for_heads(call, call.block_counts, torch.int32))),
            (spec.block_lists, _valued(pointers("i16", "block_indices"), lambda call: _for_heads(call, call.block_indices, torch.int16))),
            (spec.block_lists, _valued(aligned("list_len"), lambda call: call.block_indices.shape[-1])),
            (spec.alibi, _slopes()),
            (spec.key_bias, _valued(pointers("fp32", "key_bias"), lambda call: call.bias[:, :, 0].to(torch.float32).contiguous())),
            (spec.key_bias, _valued(integers("bias_b"), lambda call: _batch_stride(call.bias[:, :, 0]))),
            (spec.key_bias, _valued(integers("bias_h"), lambda call: 0 if call.bias.shape[1] == 1 else call.bias.shape[3])),
            (bool(spec.bias), _valued(pointers(spec.bias or "fp32", "bias"), _bias)),
            *((bool(spec.bias), _valued(aligned(f"bias_{axis}"), _bias_step(dim))) for dim, axis in enumerate("bhm")),
            (spec.sink_logits and not spec.split_keys, _sink_logits()),
        ),
    )


@functools.lru_cache(maxsize=512)
def combine_arguments(spec: AttentionSpec) -> tuple[Argument, ...]:
    """The arguments of the kernel that joins the parts of a split call, in order; none for other calls."""
    if not spec.split_keys:
        return ()
    return (
        *pointers("fp32", *PARTS),
        *pointers(spec.dtype, "out"),
        *pointers("fp32", "lse"),
        *integers("out_b", "out_h", "out_m", aligned=True),
        *_lengths(spec),
        *present((spec.sink_logits, _sink_logits()), (spec.alibi, _slopes()), (spec.alibi and spec.has_start, _start())),
        *constexprs("SPLITS"),
    )


def _valued(made: list[Argument], value: Callable[[Any], Any]) -> list[Argument]:
    """Arguments whose value is made from the record of a call; the spec says which operands it has."""
    return [argument.valued(value) for argument in made]


def _lengths(spec: AttentionSpec) -> list[Argument]:
    # a cache grows with every token: a kernel for lengths that are multiples of 16 would be compiled in the midst of a text
    growing = functools.partial(integers, specialised=False) if spec.split_keys else functools.partial(integers, aligned=True)
    return [
        *_valued(integers("kv_heads"), lambda call: call.key.shape[1]),
        *(growing("splits") if spec.split_keys else ()),
        *_valued(growing("query_len"), lambda call: call.query.shape[2]),
        *_valued(growing("key_len"), lambda call: call.key.shape[2]),
    ]


def _start() -> list[Argument]:
    return _valued(pointers("i64", "query_start"), lambda call: call.query_start.to(call.device, torch.int64))


def _slopes() -> list[Argument]:
    slopes = _valued(pointers("fp32", "alibi_slopes"), lambda call: call.alibi_slopes.to(torch.float32).contiguous())
    return [*slopes, *_valued(integers("alibi_b"), lambda call: _batch_stride(call.alibi_slopes))]


def _sink_logits() -> list[Argument]:
    return _valued(pointers("fp32", "sink_logits"), lambda call: call.sink_logits.to(torch.float32).contiguous())


def _windows(call: AttentionCall) -> Tensor:
    return on_device(tuple(min(window, LONGEST_WINDOW) for window in call.windows), call.device)


def _bias(call: AttentionCall) -> Tensor:
    """Where it is broadcast no memory is taken for it."""
    assert call.bias is not None
    bias = call.bias if call.bias.dtype in DTYPES else call.bias.to(torch.float32)
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def _bias_step(dim: int) -> Callable[[AttentionCall], int]:
    return lambda call: broadcast_stride(_bias(call), dim)


def _key_flags(call: AttentionCall) -> Tensor:
    assert call.key_flags is not None
    return call.key_flags.to(torch.uint8).contiguous()


def _for_heads(call: AttentionCall, lists: Tensor, dtype: torch.dtype) -> Tensor:
    return lists.to(dtype).expand(*call.query.shape[:2], *lists.shape[2:]).contiguous()


def _batch_stride(operand: Tensor) -> int:
    """Elements from one batch row of the contiguous operand to the next; 0 where one row serves all."""
    return 0 if operand.shape[0] == 1 else operand[0].numel()


def bounded(spec: AttentionSpec) -> bool:
    """Whether the range of keys whose flags are set is computed beforehand: split calls save those kernels unless sinks need them."""
    return spec.key_flags and (not spec.split_keys or spec.window != "none")


_STRIP = 4096  # flags that are looked at at a time


def attention_source(spec: AttentionSpec, triton_release: tuple[int, int] = (3, 6)) -> str:
    """Module text with the kernel `attention`. Grid: one axis, `programs(...)` long; launch with the spec's warps and stages.

    With split keys it is the kernel `split`, with that many programs for each part, and `combine`
    (grid: query_len * group, batch * kv_heads).

    Args:
        triton_release: major and minor number.
    """
    listed = arguments(spec)
    windowed = spec.window != "none"
    exposed = (spec.causal or windowed or spec.segments) and not spec.uniform
    state = "acc, m, l" + (", poisoned" if exposed else "")
    context = ["tanh_scale", "cap_log2"] if spec.softcap else ["scale"]
    needed = [
        (exposed and (spec.causal or windowed), "position"),
        (exposed and windowed, "window"),
        (exposed and spec.sinks == "count", "sinks"),
        (spec.key_flags, "flags_row"),
        (spec.uniform and spec.sinks == "flags", "bits"),
        (spec.segments, "segments_row"),
        (spec.segments, "one_segment" if spec.uniform else "segment"),
        (spec.segments, "has_one_segment" if spec.uniform else "has_segment"),
        (spec.alibi, "slope"),
        (spec.alibi, "anchor"),
        (spec.key_bias, "bias_row"),
        (bool(spec.bias), "bias_rows"),
    ]
    context += [name for present, name in needed if present]
    qk_dim, v_dim = padded(spec.qk_head_dim), padded(spec.v_head_dim)
    edges = [name for present, name in ((spec.sinks != "none", "sinks below the window"), (windowed, "the window's lower edge")) if present]
    values = vars(spec) | {
        "split": spec.block_size // spec.tiling.keys,
        "edge_split": spec.block_size // spec.tiling.edge_keys,
        "entry": _entry(spec.block_size // spec.tiling.keys, "KEYS"),
        "edge_entry": _entry(spec.block_size // spec.tiling.edge_keys, "EDGE_KEYS"),
        "edges": ", ".join([*edges, "the upper edge"]),
        "flags_note": "; flags always count" if spec.key_flags else "",
        "windowed": windowed,
        "bounded": bounded(spec),
        "exposed": exposed,
        # one comparison less in whole tiles, which leaves Triton 3.8's compiler the registers that 3.6's has anyway
        "lean": triton_release >= (3, 8),
        "raw": not (spec.softcap or spec.alibi or spec.key_bias or spec.bias),
        "per_row_window": spec.window == "per_head" and spec.packed,
        **head_dim_values(spec.dtype, spec.qk_head_dim, spec.v_head_dim),
        "state": state,
        "context": ", ".join(context),
        "call": ", ".join([state, "q, key_head, value_head, key_n, value_n, first, end", *context]),
        "parameters": parameters(listed),
        "jit": f"(do_not_specialize=[{fixed}])" if (fixed := unspecialised(listed)) else "",
    }
    combine = combine_arguments(spec)
    values |= {"combine_parameters": parameters(combine), "combine_unspecialised": unspecialised(combine)}
    texts = [FOLD_TILE, KERNEL, *([COMBINE] if spec.split_keys else [])]
    return "\n\n".join([_header(spec, qk_dim, v_dim), *(render(text, values) for text in texts)])


def _entry(split: int, tile: str) -> str:
    """First key of the i-th tile of the listed blocks, `split` tiles to a block."""
    if split <= 1:
        return "tl.load(entries + i).to(tl.int32) * BLOCK"
    return f"tl.load(entries + i // {split}).to(tl.int32) * BLOCK + i % {split} * {tile}"


def _header(spec: AttentionSpec, qk_dim: int, v_dim: int) -> str:
    constants = {
        "QUERIES": spec.tiling.queries,
        "KEYS": spec.tiling.keys,
        "EDGE_KEYS": spec.tiling.edge_keys,
        "GROUP": spec.group,
        "QK_DIM": qk_dim,
        "V_DIM": v_dim,
    }
    if spec.block_lists:
        constants["BLOCK"] = spec.block_size
    if spec.uniform and spec.key_flags:
        constants["STRIP"] = _STRIP
    constants |= {"LOG2E": LOG2E, "LN2": 0.6931471805599453}
    return header(f"Attention: {spec.describe()}", constants)


def programs(spec: AttentionSpec, batch: int, kv_heads: int, query_len: int) -> int:
    """Length of the launch grid."""
    if spec.packed:
        return batch * kv_heads * cdiv(query_len * spec.group, spec.tiling.queries)
    return batch * kv_heads * spec.group * cdiv(query_len, spec.tiling.queries)


# bytes of shared memory per thread block by compute capability (CUDA C++ Programming Guide); others have 99 KiB
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


def choose_tiling(
    dtype: str,
    qk_head_dim: int,
    v_head_dim: int,
    capability: tuple[int, int],
    *,
    block_size: int = 0,
    packed_rows: int = 0,
    masked: bool = False,
    split: bool = False,
) -> AttentionTiling:
    """Tile sizes by head dim and dtype, with as many stages as shared memory holds.

    Args:
        capability: CUDA compute capability.
        block_size: of the block lists that the tiles must divide, or 0.
        packed_rows: query rows times group of a call with few queries, or 0.
        masked: every tile needs the mask or a bias, so query tiles are kept small.
        split: keys are shared out among programs, of which two fit on a multiprocessor.
    """
    widest = max(padded(qk_head_dim), padded(v_head_dim))
    element = ITEM_BYTES[dtype]
    hopper = capability >= (9, 0)
    if dtype == "fp32":  # exact products run on the ordinary cores, unrolled: more than this spills
        queries, keys, warps, stages, edge_keys = (32, 32, 8, 1, 16) if widest <= 64 else (32, 16, 8, 1, 16)
    elif widest <= 64:
        queries, keys, warps, stages, edge_keys = 128, 64, 4, 3, 16
    elif widest <= 128:
        queries, keys, warps, stages, edge_keys = (128, 128, 8, 2, 32) if hopper else (128, 64, 8, 3, 32)
        if (qk_head_dim, v_head_dim) != (padded(qk_head_dim), padded(v_head_dim)):
            edge_keys = 16  # guarding padded dims takes registers, too
    else:
        queries, keys, warps, stages, edge_keys = (128, 32, 8, 3, 16) if hopper else (64, 32, 8, 2, 16)
    if packed_rows:
        queries, keys = min(queries, padded(packed_rows)), min(keys, 64)
    if split and dtype != "fp32":
        stages = max(stages, 3)
    if masked:
        queries = min(queries, 64)
    if block_size:
        queries, keys = min(queries, block_size), min(keys, block_size)
    if queries <= 64 and dtype != "fp32":
        warps, edge_keys = 4 if widest <= 128 else 8, 16
    dims = padded(qk_head_dim) + padded(v_head_dim)
    limit = _SHARED.get(capability, 99) * 1024 // (2 if split else 1)
    held = queries * max(padded(qk_head_dim), padded(v_head_dim)) * element
    while stages > 1 and held + stages * keys * dims * element > limit:
        stages -= 1
    return AttentionTiling(queries, keys, warps, stages, edge_keys)


_tiling = functools.cache(choose_tiling)


def packed(call: AttentionCall) -> bool:
    """Whether a call has so few queries that the heads of a group share a tile."""
    query_len = call.query.shape[2]
    return not call.listed and query_len <= _PACKED_QUERIES and query_len * call.group <= _PACKED_ROWS


def make_spec(call: AttentionCall, tiling: AttentionTiling | None, split: bool = False) -> AttentionSpec:
    """The kernel that a call needs; clauses that change nothing for it are left out."""
    if others := call.beyond(_SERVES):
        raise UnsupportedError(f"no attention kernel takes {', '.join(others)}", where=_WHERE, hint="the reference does")
    query, (query_len, qk_head_dim), v_head_dim = call.query, call.query.shape[2:], call.value.shape[-1]
    device = query.device
    if query.dtype not in DTYPES or call.scale <= 0:
        raise UnsupportedError(f"no attention kernel takes {query.dtype} with scale {call.scale}", where=_WHERE, hint="the reference does")
    dtype, shares = DTYPES[query.dtype], packed(call)
    flags, start = call.key_flags is not None, call.query_start is not None
    segments = call.segments is not None
    by_row = call.bias is not None and call.bias.shape[2] > 1
    if tiling is None:
        blocks, rows = call.block_size * call.listed, query_len * call.group * shares
        tiling = _tiling(
            dtype, qk_head_dim, v_head_dim, capability(device), block_size=blocks, packed_rows=rows, masked=segments or by_row, split=split
        )
    window = "none" if not call.windowed else "one" if len(set(call.windows)) == 1 else "per_head"
    counted = "count" if call.sinks > 0 else "none"
    return AttentionSpec(
        dtype=dtype,
        qk_head_dim=qk_head_dim,
        v_head_dim=v_head_dim,
        group=call.group,
        tiling=tiling,
        # the last row sees every key when it stands on the last one
        causal=call.causal and (query_len > 1 or start),
        window=window,
        sinks="none" if not call.windowed else "flags" if flags else counted,
        key_flags=flags,
        segments=segments,
        has_start=start,
        block_lists=call.listed,
        block_size=call.block_size if call.listed else 0,
        softcap=call.softcap > 0,
        alibi=call.alibi_slopes is not None,
        key_bias=call.bias is not None and not by_row,
        bias=DTYPES.get(call.bias.dtype, "fp32") if call.bias is not None and by_row else "",
        sink_logits=call.sink_logits is not None,
        packed=shares,
        split_keys=split,
        uniform=split and query_len == 1 and window != "per_head",
    )


def _flag_bounds(flags: Tensor, batch: int) -> Tensor:
    """int32 [batch, 4]: first real key, one past the last, first sink, one past the last; empty ranges are (key_len, 0)."""
    key = torch.arange(flags.shape[1], dtype=torch.int32, device=flags.device)
    bounds = []
    for bits in (1, 3):
        present = flags & bits == bits
        bounds += [torch.where(present, key, flags.shape[1]).amin(-1), torch.where(present, key + 1, 0).amax(-1)]
    return torch.stack(bounds, -1).to(torch.int32).expand(batch, 4).contiguous()
