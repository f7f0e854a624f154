"""How near decode attention comes to the memory's bandwidth where every key stays: one layer over each kind of cache, beside peers.

    python -m benchmarks run full                                       # batch 1 at 32K and 128K, batch 8 at 16K, padded
    python -m benchmarks run full --calls 1x32768 8x16384p --sweep      # p: padded to the longest row; every tiling of the full cache
    python -m benchmarks run full --device cpu --shape tiny --calls 2x256p

A cache has a quarter more room than it holds. GB/s count the keys and values in use: not empty slots, not padding. Calls take turns on the
layers of a model, so that keys come from memory. Appends to results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cache import DecodeFull
from benchmarks.cache.run import SWEEP
from benchmarks.lib import peers, records
from benchmarks.lib.models import SHAPES
from sparsify import backends
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.commands.bench.clock import Clock, reason
from sparsify.ops import attention as ops
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheDecodeCall

_CALL = re.compile(r"(\d+)x(\d+)(p?)")
_LAYER_BYTES = 8 << 30  # of all the layers that take turns
Step = Callable[["Layer"], Tensor]


@dataclass(frozen=True)
class Case:
    """A decode step. length: tokens of the longest row. padded: rows of half to all of that; others hold `length`."""

    batch: int
    length: int
    padded: bool

    @classmethod
    def parse(cls, text: str) -> Case:
        found = _CALL.fullmatch(text)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is not batch x length, as in 8x16384p")
        return cls(int(found[1]), int(found[2]), bool(found[3]))

    @property
    def rows(self) -> list[int]:
        """Tokens of each row."""
        span = max(1, self.batch - 1)
        return [self.length - (self.length // 2 * row // span if self.padded else 0) for row in range(self.batch)]

    @property
    def capacity(self) -> int:
        return -(-self.length * 5 // 4 // 64) * 64


@dataclass
class Layer:
    """Slots of one layer, in order of position where a full cache reads them and behind the padding where a static one does."""

    keys: Tensor
    values: Tensor
    state: tuple[Tensor, ...]
    tickets: Tensor

    def restart(self, case: Case) -> None:
        """As it was before a token was stored; slots beyond the counts are not read."""
        _, counts, seen, length = self.state
        seen.copy_(torch.tensor(case.rows))
        counts.copy_(seen[:, None].expand_as(counts))
        length.fill_(case.length)


def layers(case: Case, shape: dict[str, int], device: str, dtype: torch.dtype) -> list[Layer]:
    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    size = 2 * case.batch * heads * case.capacity * dim * dtype.itemsize
    count = max(2, min(8, _LAYER_BYTES // size)) if device == "cuda" else 2
    ints = {"dtype": torch.int32, "device": device}
    rows = torch.tensor(case.rows, **ints)
    slot = torch.arange(case.capacity, **ints)
    found = []
    for _ in range(count):
        keys, values = (torch.randn(case.batch, heads, case.capacity, dim, dtype=dtype, device=device) for _ in range(2))
        positions = torch.where(slot < rows[:, None], slot, -1).to(torch.int32)[:, None].repeat(1, heads, 1)
        counts, length = rows[:, None].repeat(1, heads), torch.tensor(case.length, dtype=torch.int64, device=device)
        found.append(Layer(keys, values, (positions, counts, rows.clone(), length), torch.zeros(case.batch * heads + 1, **ints)))
    return found


def token(case: Case, shape: dict[str, int], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value of one token of each row, as a model hands them over."""
    heads, own, dim = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return tuple(torch.randn(case.batch, 1, count, dim, dtype=dtype, device=device).transpose(1, 2) for count in (heads, own, own))


def contestants(case: Case, call_token: tuple[Tensor, ...], sweep: bool) -> dict[str, Step]:
    """What computes a step over a layer: ours over a full cache, over a static one by position or by its mask, and peers."""
    query, key, _ = call_token
    (batch, heads, _, dim), device = query.shape, query.device
    slot, first = torch.arange(case.capacity, device=device), torch.tensor([case.length - row for row in case.rows], device=device)
    last = torch.tensor([case.length - 1], device=device)
    shown = (slot >= first[:, None]) & (slot <= last)  # [batch, capacity]
    flags = shown.to(torch.uint8)
    call = {"scale": dim**-0.5, "version": ops.VERSION, "causal": True, "windows": [], "sinks": 0, "softcap": 0.0, "block_size": 128}
    used, group = slice(0, case.length), heads // key.shape[1]
    repeated = lambda t: t[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, *t.shape[2:])

    def attention(keys: Tensor, values: Tensor, **clauses: object) -> Tensor:
        return ops.attention(query, keys, values, seq_major=True, **(call | clauses))[0]

    def flash(layer: Layer) -> Tensor:
        try:
            from flash_attn_interface import flash_attn_with_kvcache  # FlashAttention-3
        except ImportError:
            from flash_attn import flash_attn_with_kvcache
        turned = [t.transpose(1, 2) for t in (query, layer.keys, layer.values)]
        lengths = torch.full((batch,), case.length, dtype=torch.int32, device=device)
        return flash_attn_with_kvcache(*turned, cache_seqlens=lengths, causal=True).transpose(1, 2)

    def sdpa(name: str) -> Step:
        return lambda layer: peers.sdpa(name, query, layer.keys[:, :, used], layer.values[:, :, used], causal=False)()

    padding = {"key_flags": flags} if case.padded else {}
    found: dict[str, Step] = {
        "full cache": lambda layer: full(layer, call_token, None),
        "static cache": lambda layer: attention(layer.keys, layer.values, query_start=last, **padding),
        "static cache, mask given": lambda layer: attention(layer.keys, layer.values, key_flags=flags, causal=False),
        "masked": lambda layer: F.scaled_dot_product_attention(
            query, repeated(layer.keys), repeated(layer.values), attn_mask=shown[:, None, None]
        ),
    }
    found |= {f"full cache {vars(tiling)}": lambda layer, tiling=tiling: full(layer, call_token, tiling) for tiling in SWEEP if sweep}
    if case.padded:
        dynamic = lambda layer: attention(layer.keys[:, :, used], layer.values[:, :, used], key_flags=flags[:, used])
        return found | {"dynamic cache": dynamic}
    if query.is_cuda:
        return found | {"cudnn": sdpa("cudnn"), "fa2": sdpa("fa2"), "flash_attn": flash}
    return found | {"sdpa": sdpa("sdpa")}


def full(layer: Layer, call_token: tuple[Tensor, ...], tiling: DecodeTiling | None) -> Tensor:
    """Stores the token and attends; a CPU runs the reference."""
    options = {"pinned": NEVER_OVERWRITTEN, "scale": call_token[0].shape[-1] ** -0.5, "softcap": 0.0, "window": 0, "sinks": 0}
    call = CacheDecodeCall(*call_token, layer.keys, layer.values, *layer.state, tickets=layer.tickets, **options)
    return call.run() if tiling is None else cache_decode(call, tiling=tiling)


def error_over(case: Case, query: Tensor, run: Step, layer: Layer, stores: bool) -> float:
    """Largest error of the longest and the shortest row against SDPA in fp32. stores: the token is attended to, too."""
    out, worst = run(layer), 0.0
    for row in {0, case.batch - 1}:
        count = int(layer.state[1][row, 0])
        seen = slice(0, count) if stores else slice(case.length - case.rows[row], case.length)
        keys, values = (t[row : row + 1, :, seen].float() for t in (layer.keys, layer.values))
        want = F.scaled_dot_product_attention(query[row : row + 1].float(), keys, values, enable_gqa=True)
        worst = max(worst, (out[row : row + 1].float() - want).abs().max().item())
    return worst


def measure(case: Case, options: argparse.Namespace) -> None:
    clock, shape = Clock(options.device), SHAPES[options.shape]
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    torch.manual_seed(0)
    held, call_token = layers(case, shape, options.device, dtype), token(case, shape, options.device, dtype)
    read = 2 * sum(case.rows) * shape["num_key_value_heads"] * shape["head_dim"] * dtype.itemsize
    for name, run in contestants(case, call_token, options.sweep).items():
        stores = name.startswith("full cache")
        turns = itertools.cycle(held)
        for layer in held:  # of what earlier contestants stored
            layer.restart(case)
        facts = {"variant": name, "batch": case.batch, "length": case.length, "capacity": case.capacity, "padded": case.padded}
        try:
            with backends.strict():  # a reference in a kernel's place would be timed as one
                error = error_over(case, call_token[0], run, held[0], stores)
                ms = clock.replays(lambda run=run, turns=turns: run(next(turns)))
        except Exception as failure:
            print(f"{name:25} {reason(failure)}", flush=True)
            continue
        speed = read / ms / 1e6
        print(
            f"{name:25} {case.batch} x {case.length}{' padded' * case.padded}: {ms:.4f} ms, {speed:.0f} GB/s, error {error:.1e}", flush=True
        )
        records.append(options.out, DecodeFull(**facts, shape=options.shape, ms=ms, gb_per_s=speed, error=error))
        if stores and any(int(layer.state[1].max()) > case.capacity for layer in held):
            raise RuntimeError(f"{name} ran out of room: {case.capacity} slots")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [Case(1, 32768, False), Case(1, 131072, False), Case(8, 16384, False), Case(8, 16384, True)]
    parser.add_argument("--calls", type=Case.parse, nargs="+", default=usual, help="batch x length; with a p behind: padded")
    parser.add_argument("--sweep", action="store_true", help="every tiling of the full cache's kernel, too")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "decode.jsonl")
    options = parser.parse_args(arguments)
    for case in options.calls:
        measure(case, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
