"""What sparsify is compared with: dense and block-sparse attention by others, and whole models without it.

Each contestant is a function without arguments. One that is not installed, or does not take the call, fails when it first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES = {"ours": "sparsify", "ours, dense": "sparsify", "fa4": "FlashAttention-4", "cudnn": "cuDNN", "fa2": "FlashAttention-2",
         "flash": "FlashAttention-2", "flex": "FlexAttention", "sdpa": "SDPA", "sparsify": "sparsify"}  # fmt: skip
MODELS: dict[str, dict[str, Any] | None] = {"eager": None, "inductor": {"backend": "inductor"}}  # arguments of `model.compile`
BLOCK = 128
_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION, "sdpa": SDPBackend.MATH}
Run = Callable[[], Tensor]


def sdpa(name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Run:
    """PyTorch's attention by one of its kernels; `query` may have more heads than `key` and `value`."""

    def run() -> Tensor:
        with sdpa_kernel(_SDPA[name]):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return run


def dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Run]:
    """Causal attention over every key, [batch, heads, length, dim] each."""
    if not query.is_cuda:
        return {"sdpa": sdpa("sdpa", query, key, value, True)}

    def fa4() -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        return _flash_attn_fwd(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)[0].transpose(1, 2)

    return {"fa4": fa4} | {name: sdpa(name, query, key, value, True) for name in ("cudnn", "fa2")}


def block_sparse(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> dict[str, Run]:
    """Causal attention over the blocks of `keep`, bool [batch, heads, query_blocks, key_blocks]."""
    return {name: _lazy(make, query, key, value, keep) for name, make in (("flex", _flex), ("fa4", _fa4))}


def _lazy(make: Callable[..., Run], *operands: Tensor) -> Run:
    made = functools.cache(lambda: make(*operands))
    return lambda: made()()


def _partial_and_full(keep: Tensor) -> tuple[Tensor, ...]:
    """Counts and int32 indices of the partial blocks (the diagonal), and of the full ones."""
    diagonal = torch.eye(keep.shape[-1], dtype=torch.bool, device=keep.device)
    packed = []
    for part in (keep & diagonal, keep & ~diagonal):
        packed += [part.sum(-1, dtype=torch.int32), part.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)]
    return tuple(packed)


def _flex(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Run:
    from torch.nn.attention.flex_attention import BlockMask

    mask = BlockMask.from_kv_blocks(*_partial_and_full(keep), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=lambda b, h, q, k: q >= k)
    return lambda: _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=True)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _fa4(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Run:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    lists = BlockSparseTensorsTorch(**dict(zip(names, _partial_and_full(keep), strict=True)), block_size=(BLOCK, BLOCK))
    operands = tuple(t.transpose(1, 2) for t in (query, key, value))
    options = {"mask_mod": _causal_predicate(), "block_sparse_tensors": lists, "pack_gqa": False}
    return lambda: _flash_attn_fwd(*operands, **options)[0].transpose(1, 2)


@functools.cache
def _causal_predicate() -> Any:
    from cutlass import cute

    @cute.jit
    def causal(b, h, q_idx, kv_idx, seqlen_info, aux):
        return q_idx >= kv_idx

    return causal
