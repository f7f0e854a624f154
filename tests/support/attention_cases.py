"""Random operands of the attention op, with every clause."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.ops.attention import AttentionCall
from tests.support.attention_oracle import default_scale


@dataclass(frozen=True)
class Case:
    """What a call of the op looks like, before its tensors are drawn from `seed`."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    query_len: int = 16
    key_len: int = 16
    qk_head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    windows: tuple[int, ...] = ()
    sinks: int = 0
    padding: str = ""  # "", "left", "right" or "holes"
    segments: bool = False
    start: int | None = None
    lists: bool = False
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int] = (0, 0)  # its batch rows and heads
    bias_rows: bool = False  # whether each query row has its own
    sink_logits: bool = False
    block_size: int = 16
    seq_major: bool = False
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


# what makes a call of 4 heads, 24 query rows and 40 keys differ from a plain causal one
CLAUSES = {
    "window": {"windows": (7,)},
    "window_per_head": {"windows": (0, 3, 9, 20)},
    "window_and_sinks": {"windows": (7,), "sinks": 3},
    "left_padding_sinks": {"windows": (7,), "sinks": 3, "padding": "left"},
    "padding": {"padding": "holes"},
    "segments": {"segments": True},
    "lists": {"lists": True},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "key_bias": {"bias": (2, 4)},
    "one_key_bias": {"bias": (1, 1)},
    "bias": {"bias": (2, 4), "bias_rows": True},
    "one_bias": {"bias": (1, 1), "bias_rows": True},
    "sink_logits": {"sink_logits": True},
    "not_causal": {"causal": False},
    "start": {"start": 3},
}


def make_call(case: Case) -> AttentionCall:
    """The call, its tensors drawn."""
    torch.manual_seed(case.seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(case.dtype)
    query = draw(case.batch, case.heads, case.query_len, case.qk_head_dim)
    key = draw(case.batch, case.kv_heads, case.key_len, case.qk_head_dim)
    value = draw(case.batch, case.kv_heads, case.key_len, case.v_head_dim)
    query_blocks, key_blocks = -(-case.query_len // case.block_size), -(-case.key_len // case.block_size)
    keep = torch.rand(case.batch, case.heads, query_blocks, key_blocks) < 0.5
    counts = keep.sum(-1, dtype=torch.int32)
    # unused entries are never to be read: a number that no list may hold
    indices = torch.full(keep.shape, 32767, dtype=torch.int16)
    for where in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).view(-1, 3).tolist():
        kept = keep[tuple(where)].nonzero()[:, 0]
        indices[tuple(where)][: len(kept)] = kept
    return AttentionCall(
        query,
        key,
        value,
        key_flags=_flags(case) if case.padding else None,
        segments=torch.randint(0, 3, (case.batch, case.key_len)).sort(-1).values.int() if case.segments else None,
        query_start=None if case.start is None else torch.tensor([case.start]),
        block_counts=counts if case.lists else None,
        block_indices=indices if case.lists else None,
        sink_logits=torch.randn(case.heads) if case.sink_logits else None,
        alibi_slopes=torch.rand(case.batch, case.heads) * 0.5 if case.alibi else None,
        bias=torch.randn(*case.bias, case.query_len if case.bias_rows else 1, case.key_len) if all(case.bias) else None,
        scale=default_scale(case.qk_head_dim) * 1.5,
        causal=case.causal,
        windows=case.windows,
        sinks=case.sinks,
        softcap=case.softcap,
        block_size=case.block_size,
        seq_major=case.seq_major,
    )


def _flags(case: Case) -> torch.Tensor:
    """Bit 0 where a key is real, bit 1 on the first `sinks` real keys of each row; the last batch row is all padding when there are 3."""
    real = torch.ones(case.batch, case.key_len, dtype=torch.bool)
    for b in range(case.batch):
        padded = int(torch.randint(0, case.key_len, ()))
        if case.padding == "left":
            real[b, :padded] = False
        elif case.padding == "right":
            real[b, case.key_len - padded :] = False
        else:
            real[b] = torch.rand(case.key_len) < 0.5
        real[b] &= b < 2
    sink = real & (real.cumsum(-1) <= case.sinks)
    return (real.to(torch.uint8) | sink.to(torch.uint8) << 1).contiguous()
