"""What the kernels over a cache share: arguments and values that each of them takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.backends.cache.reference import rotate
from sparsify.backends.codegen.arguments import Argument, floats
from sparsify.backends.codegen.launch import LOG2E, capability, need, power_of_two
from sparsify.errors import UnsupportedError
from sparsify.ops.cache import CacheAttentionCall, CacheDecodeCall
from sparsify.ops.quantised import GROUP

# from which E4M3 becomes other numbers by an instruction
FP8_CAPABILITY = (8, 9)


def logit_arguments(softcap: bool) -> list[Argument]:
    """How products become logits in base 2: `logit_values` are their values."""
    return floats("tanh_scale", "cap_log2") if softcap else floats("scale")


def logit_values(scale: float, softcap: float) -> dict[str, float]:
    capped = {"tanh_scale": 2 * LOG2E * scale / softcap, "cap_log2": softcap * LOG2E} if softcap > 0 else {}
    return {"scale": scale * LOG2E, **capped}


def check_code_dims(where: str, codes: str, *head_dims: int) -> None:
    """Raises UnsupportedError unless kernels read codes of these head dims."""
    # a product takes 16 channels at once, of 4-bit codes from each quarter of them
    least = 64 if codes == "int4" else 32
    if any(dim != power_of_two(dim) or not least <= dim <= 256 for dim in head_dims):
        raise UnsupportedError(f"no kernel reads {codes} codes of head dims {' and '.join(map(str, head_dims))}", where=where)


def check_codes(call: CacheDecodeCall | CacheAttentionCall, where: str) -> None:
    """Raises UnsupportedError unless kernels read the codes of a call."""
    buffers = (call.keys, call.values, call.key_scales, call.value_scales, call.recent_keys, call.recent_values, call.staged)
    need(all(t is not None and t.is_contiguous() for t in buffers), "the cache's buffers are not contiguous", where)
    numbers = (call.key_scales, call.value_scales, call.recent_keys, call.recent_values)
    need(all(t is not None and t.dtype == call.query.dtype for t in numbers), f"scales beside {call.query.dtype}", where)
    need(call.inverse_frequencies is None, "codes seen by rotated queries", where)
    check_fp8(call.codes, call.query.device, where)


def check_fp8(codes: str, device: torch.device, where: str) -> None:
    """Raises UnsupportedError where kernels of this device do not read such codes."""
    need(codes != "fp8" or capability(device) >= FP8_CAPABILITY, "fp8 codes below compute capability 8.9", where)


def packed_values(packed: bool) -> dict[str, str]:
    """Number of a head's slots and places of its first one and of its first group of codes, as templates write them."""
    if not packed:
        groups = "tl.cast(row, tl.int64) * groups"
        return {"size": "capacity", "place": "tl.cast(row, tl.int64) * capacity", "group_place": groups}
    groups = f"tl.cast(batch, tl.int64) * kv_heads * groups + tl.load(bound) // {GROUP} + kv_head"
    return {"size": "size", "place": "first_slot", "group_place": groups}


def partial_sums(sums: int, v_head_dim: int, device: torch.device) -> dict[str, Tensor]:
    """Room for the maxima, sums and weighted values of `sums` partial softmaxes, in one allocation."""
    part = torch.empty(sums * (v_head_dim + 2), dtype=torch.float32, device=device)
    return {"part_acc": part, "part_m": part[sums * v_head_dim :], "part_l": part[sums * (v_head_dim + 1) :]}


def rotated_queries(query: Tensor, at: Tensor, sinks: int, window: int, inverse_frequencies: Tensor) -> Tensor:
    """Queries [batch, heads, query_len, head_dim] as sinks see them that stand directly before a window. at: their positions, [batch,
    query_len]."""
    steps = -(at + 1 - sinks - window).clamp(min=0)[:, None]
    return rotate(query.float(), steps, inverse_frequencies).to(query.dtype).contiguous()
