"""Calls of the cache kernels for compute-sanitizer: one token, several tokens, scores, every clause. `run` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cache import run
from sparsify.backends.cache import append, decode, mass, pages
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheMassCall
from sparsify.ops.pages import Pages

_OPTIONS = {"scale": 0.1, "softcap": 0.0, "window": 0, "sinks": 0}
_WINDOW = {"window": 250, "sinks": 4}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    turned = {**_WINDOW, "inverse_frequencies": True, "softcap": 20.0, "sink_logits": True}
    for tokens in (90, 1000):
        yield f"one token, one kernel, {tokens} held", lambda tokens=tokens: one(tokens, tickets=True)
        yield f"one token, two kernels, {tokens} held", lambda tokens=tokens: one(tokens)
    yield "one token, padding, turned sinks, softcap", lambda: one(1000, tickets=True, padded=True, **turned)
    yield "one token, pages", lambda: one(1000, tickets=True, pages=Pages(size=16, count=3))
    yield "one token, pages, two kernels, padding", lambda: one(1000, padded=True, pages=Pages(size=8, share=0.3))
    yield "one token, packed heads", lambda: one(200, tickets=True, packed=True)
    yield "one token, packed heads, two kernels, padding", lambda: one(200, packed=True, padded=True)
    yield "several tokens, packed heads", lambda: several(70, held=200, packed=True)
    yield "bounds of pages", bounds_of_pages
    yield "several tokens, slots split", lambda: several(5)
    yield "several tokens, window", lambda: several(300, **_WINDOW)
    yield "several tokens, padding, turned sinks, softcap", lambda: several(70, padded=True, **turned)
    yield "scores", lambda: scores(32)
    yield "scores, softcap, more queries than a tile", lambda: scores(70, softcap=20.0)


def _filled(tokens: int, options: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A layer of 254 slots and the options with their tensors in place."""
    options = {**_OPTIONS, **options}
    if options.pop("inverse_frequencies", False):
        options["inverse_frequencies"] = 1 / 10000 ** torch.linspace(0, 1, run.DIM // 2, device="cuda")
    if options.pop("sink_logits", False):
        options["sink_logits"] = torch.randn(run.HEADS, device="cuda")
    if options.pop("packed", False):  # heads of 214 and of 294 slots by turns
        starts = torch.arange(run.KV_HEADS + 1, device="cuda") * 254
        starts[1::2] -= 40
        options["starts"] = starts.to(torch.int32).expand(2, -1).contiguous()
    return run.state(2, 254, tokens), options


def one(tokens: int, tickets: bool = False, padded: bool = False, **options: Any) -> None:
    layer, options = _filled(tokens, options)
    if tickets:
        options["tickets"] = torch.zeros(2 * run.KV_HEADS + 1, dtype=torch.int32, device="cuda")
    if padded:
        options["is_token"] = torch.tensor([[True], [False]], device="cuda")
    if read := options.get("pages"):
        options["bounds"] = layer[0].new_zeros(2, run.KV_HEADS, read.of(254), 2, run.DIM)
    pinned = NEVER_OVERWRITTEN if "starts" in options else 4
    decode.cache_decode(CacheDecodeCall(*run.step(2), *layer, pinned=pinned, **options))


def bounds_of_pages() -> None:
    (keys, _, positions, counts, _, _), _ = _filled(200, {})
    bounds = keys.new_zeros(2, run.KV_HEADS, 16, 2, run.DIM)
    pages.cache_bounds(CacheBoundsCall(keys, positions, bounds, since=counts // 2, size=16))


def several(count: int, padded: bool = False, held: int = 1000, **options: Any) -> None:
    (keys, values, positions, _, seen, _), options = _filled(held, options)
    query, key, value = (torch.randn(2, count, heads, run.DIM, dtype=keys.dtype, device="cuda").transpose(1, 2) for heads in (32, 8, 8))
    if padded:
        options["is_token"] = torch.rand(2, count, device="cuda") > 0.3
    append.cache_attention(CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, **options))


def scores(queries: int, softcap: float = 0.0) -> None:
    make = lambda heads, count: torch.randn(2, heads, count, run.DIM, dtype=torch.bfloat16, device="cuda")
    at = torch.arange(1001, dtype=torch.int32, device="cuda")
    positions, asked = at.expand(2, run.KV_HEADS, -1), at[-queries:].expand(2, -1)
    call = CacheMassCall(make(run.HEADS, queries), make(run.KV_HEADS, 1001), positions, asked, scale=0.1, softcap=softcap)
    mass.cache_mass(call)
