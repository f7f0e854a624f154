"""What does a token cost that reads less? One layer's step over a cache in 16, 8 and 4 bits, over 5 % of the pages of each, over 5 % of a
prefix in clusters, and several tokens at once over all of each.

    python -m benchmarks run reading                                      # 128K tokens at batch 1 and 8
    python -m benchmarks run reading --calls 1x32768 --shares 0.02 0.1
    python -m benchmarks run reading --device cpu --shape tiny --calls 2x256 --several 8

Milliseconds are of one layer and of all layers of the shape, without its weights. Bytes are what a step reads: codes with their scales, or
bounds and the pages that are listed, or the clusters' means that are looked at and the chosen clusters. Error: the largest, against SDPA in
fp32 over the keys before rounding; of pages and clusters it is what they leave out of random keys, none of which are worth more than
others; of several tokens it is the last one's. What no kernel serves on a GPU is told, not
timed. Calls take turns on layers, so that keys come from memory. Appends to results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cache import DecodeReading
from benchmarks.cache.full import Case, token
from benchmarks.lib import records
from benchmarks.lib.models import SHAPES
from sparsify import backends, policies
from sparsify.commands.bench.clock import Clock, reason
from sparsify.generation.caches.layer import SparseLayer
from sparsify.ops import cache
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheDecodeCall
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import GROUP, Clusters, Pages
from sparsify.ops.quantised import token_bytes

# bytes of the layers that calls take turns on: more than a GPU's L2 cache
_LAYER_BYTES = 8 << 30


@dataclass
class Reading:
    """One way to hold and read keys: `layer` has no tokens yet."""

    name: str
    layer: SparseLayer

    def bytes_read(self, case: Case, dim: int, dtype: torch.dtype) -> float:
        """Of one token and KV head."""
        slots, read, own = case.length, self.layer.read, token_bytes(dim, dim, self.layer.codes, dtype)
        if read is None:
            return slots * own
        pages = read.of(slots)
        chosen = min(slots, read.chosen(pages) * read.size + read.recent + read.sinks)
        rows = 2 * pages  # bounds are two
        if isinstance(read, Clusters):
            groups = cdiv(pages, GROUP)
            rows = groups + min(pages, read.groups.chosen(groups) * GROUP) if read.groups else pages
        return rows * dim * dtype.itemsize + chosen * own


def readings(shares: list[float], several: int, sizes: Sequence[int] = (16,)) -> list[tuple[str, dict[str, Any], int]]:
    """Name, options of the layer, tokens of a call."""
    stored: list[tuple[str, dict[str, Any]]] = [("16 bits", {}), ("fp8", {"codes": "fp8"}), ("int4", {"codes": "int4"})]
    found = [(name, how, 1) for name, how in stored]
    for size, share in itertools.product(sizes, shares):
        pages, said = {"read": Pages(size=size, share=share)}, f"pages {share:g}" + (f" of {size}" if size != Pages().size else "")
        found += [(said if not how else f"{name} {said}", how | pages, 1) for name, how in stored]
    for share in shares:
        found.append((f"clusters {share:g}", {"read": Clusters(share=share)}, 1))
    return found + [(f"{name}, {several} tokens at once", how, several) for name, how in stored if several > 1]


def taking_turns(
    count: int, case: Case, shape: dict[str, int], device: str, dtype: torch.dtype, options: dict[str, Any]
) -> list[tuple[SparseLayer, Tensor, Tensor]]:
    """Layers as `filled` makes them, with a prefix that is prepared where they read clusters: found once, as it takes long, and copied."""
    if not isinstance(options.get("read"), Clusters):
        return [filled(case, shape, device, dtype, options) for _ in range(count)]
    layer, key, value = filled(case, shape, device, dtype, options)
    layer.prepare()
    return [(layer, key, value), *((copy.deepcopy(layer), key, value) for _ in range(count - 1))]


def filled(
    case: Case, shape: dict[str, int], device: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[SparseLayer, Tensor, Tensor]:
    """A layer of random tokens, stored as a prompt is, and those tokens."""
    policy = policies.make("full")
    layer = SparseLayer(0, None, policy, case.capacity, sliding=False, frequencies=None, **options)
    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    key, value = (torch.randn(case.batch, heads, case.length, dim, dtype=dtype, device=device) for _ in range(2))
    layer.allocate(key, value, case.capacity)
    how = {"pinned": NEVER_OVERWRITTEN, "recent": 0, "policy": policy.describe(), "scale": 1.0, "softcap": 0.0, "version": cache.VERSION}
    cache.store(None, key, value, *layer.state, empty=True, **how, **layer.reading(), **layer.coded())
    return layer, key, value


def step(layer: SparseLayer, call_token: tuple[Tensor, ...]) -> Tensor:
    """Stores the token and attends; several tokens attend alone. A CPU runs the reference."""
    query, key, value = call_token
    how: dict[str, Any] = {"scale": query.shape[-1] ** -0.5, "softcap": 0.0, "window": 0, "sinks": 0, **layer.coded()}
    if query.shape[2] > 1:
        keys, values, positions, _, seen, _ = layer.state
        return CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, **how).run()
    more = {"bounds": layer.bounds, "pages": layer.read, "prepared": layer.prepared} if layer.read is not None else {}
    return CacheDecodeCall(query, key, value, *layer.state, tickets=layer.tickets, pinned=NEVER_OVERWRITTEN, **how, **more).run()


def measure(case: Case, options: argparse.Namespace) -> None:
    clock, shape = Clock(options.device), cast("dict[str, int]", SHAPES[options.shape])
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    torch.manual_seed(0)
    one = token(case, shape, options.device, dtype)
    many = tuple(t.expand(-1, -1, options.several, -1).contiguous() + 0.1 * torch.randn_like(t) for t in one)
    size = 2 * case.batch * heads * case.capacity * dim * dtype.itemsize
    count = max(2, min(8, _LAYER_BYTES // size)) if clock.cuda else 2
    for name, how, tokens in readings(options.shares, options.several, options.sizes):
        if options.variants and name not in options.variants:
            continue
        call_token = one if tokens == 1 else many
        try:
            made = taking_turns(count, case, shape, options.device, dtype, how)
            layer, key, value = made[0]
            # a reference in a kernel's place would be timed as one
            with backends.serving("triton" if clock.cuda else "auto", strict=True):
                own_key, own_value = (torch.cat(pair, 2)[:1].float() for pair in ((key, call_token[1]), (value, call_token[2])))
                want = F.scaled_dot_product_attention(call_token[0][:1, :, -1:].float(), own_key, own_value, enable_gqa=True)
                del own_key, own_value
                error = (step(layer, call_token)[:1, :, -1:].float() - want).abs().max().item()
                turns = itertools.cycle([held for held, _, _ in made])
                run: Callable[[], Tensor] = lambda turns=turns, call_token=call_token: step(next(turns), call_token)
                ms = clock.replays(run)
        except Exception as failure:
            print(f"{name:12} {case.batch} x {case.length}: {reason(failure)}", flush=True)
            continue
        read = case.batch * heads * Reading(name, layer).bytes_read(case, dim, dtype)
        token_ms = ms * shape["num_hidden_layers"]
        print(
            f"{name:12} {case.batch} x {case.length}: {ms:.4f} ms a layer, {token_ms:.2f} ms a token's attention, "
            f"{read / ms / 1e6:.0f} GB/s, error {error:.1e}",
            flush=True,
        )
        facts: dict[str, Any] = {"variant": name, "shape": options.shape, "batch": case.batch, "length": case.length}
        values: dict[str, Any] = {"ms": ms, "ms_all_layers": token_ms, "bytes_read": round(read), "error": error}
        records.append(options.out, DecodeReading(**facts, **values))
        del made, layer, key, value, turns, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = [Case(1, 131072, False), Case(8, 131072, False)]
    parser.add_argument("--calls", type=Case.parse, nargs="+", default=usual, help="batch x length")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05], help="of the pages")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32], help="slots of a page")
    parser.add_argument("--variants", nargs="+", help="names of what is timed, as records have them; without it all")
    parser.add_argument("--several", type=int, default=512, help="tokens at once; 1: no such calls")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "decode.jsonl")
    options = parser.parse_args(arguments)
    for case in options.calls:
        measure(case, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
