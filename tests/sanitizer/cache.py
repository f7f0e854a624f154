"""Calls of the cache kernels for compute-sanitizer: one token, several tokens, scores, every clause and code. `run` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cache import run
from sparsify import policies
from sparsify.backends.cache import append, decode, mass, pages, quantised, reference, take_back
from sparsify.ops.cache import (
    NEVER_OVERWRITTEN,
    CacheAttentionCall,
    CacheBoundsCall,
    CacheDecodeCall,
    CacheMassCall,
    CacheStoreCall,
)
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.taking_back import Counters, Places
from tests.backends.cache.test_quantised import buffers, counters

_OPTIONS = {"scale": 0.1, "softcap": 0.0, "window": 0, "sinks": 0}
_WINDOW = {"window": 250, "sinks": 4}


def cases(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    turned = {**_WINDOW, "inverse_frequencies": True, "softcap": 20.0, "sink_logits": True}
    calls: dict[str, Callable[[], None]] = {}
    for tokens in (90, 1000):
        calls[f"one token, one kernel, {tokens} held"] = lambda tokens=tokens: one(device, tokens, tickets=True)
        calls[f"one token, two kernels, {tokens} held"] = lambda tokens=tokens: one(device, tokens)
    for codes in ("fp8", "int4"):
        calls[f"one token, {codes}"] = lambda codes=codes: one_of_codes(device, codes)
        calls[f"one token, {codes}, pages"] = lambda codes=codes: one_of_codes(device, codes, pages=Pages(size=16, count=3))
    yield from calls.items()
    yield "one token, padding, turned sinks, softcap", lambda: one(device, 1000, tickets=True, padded=True, **turned)
    yield "one token, pages", lambda: one(device, 1000, tickets=True, pages=Pages(size=16, count=3))
    yield "one token, pages, two kernels, padding", lambda: one(device, 1000, padded=True, pages=Pages(size=8, share=0.3))
    yield "one token, clusters", lambda: one(device, 200, tickets=True, pages=Clusters(size=8, count=6, reach=2), clustered=True)
    yield "one token, packed heads", lambda: one(device, 200, tickets=True, packed=True)
    yield "one token, packed heads, two kernels, padding", lambda: one(device, 200, packed=True, padded=True)
    yield "several tokens, packed heads", lambda: several(device, 70, held=200, packed=True)
    yield "bounds of pages", lambda: bounds_of_pages(device)
    yield "several tokens, slots split", lambda: several(device, 5)
    yield "several tokens, window", lambda: several(device, 300, **_WINDOW)
    yield "several tokens, padding, turned sinks, softcap", lambda: several(device, 70, padded=True, **turned)
    yield "several tokens, 4 bits", lambda: several_of_codes(device, 40, "int4")
    yield "tokens taken back", lambda: taken_back(device)
    yield "scores", lambda: scores(device, 32)
    yield "scores, softcap, more queries than a tile", lambda: scores(device, 70, softcap=20.0)


def _filled(device: str, tokens: int, options: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A layer of 254 slots and the options with their tensors in place."""
    options = {**_OPTIONS, **options}
    if options.pop("inverse_frequencies", False):
        options["inverse_frequencies"] = 1 / 10000 ** torch.linspace(0, 1, run.DIM // 2, device=device)
    if options.pop("sink_logits", False):
        options["sink_logits"] = torch.randn(run.HEADS, device=device)
    if options.pop("packed", False):  # heads of 214 and of 294 slots by turns
        starts = torch.arange(run.KV_HEADS + 1, device=device) * 254
        starts[1::2] -= 40
        options["starts"] = starts.to(torch.int32).expand(2, -1).contiguous()
    return run.state(2, 254, tokens, device), options


def one(device: str, tokens: int, tickets: bool = False, padded: bool = False, clustered: bool = False, **options: Any) -> None:
    layer, options = _filled(device, tokens, options)
    if tickets:
        options["tickets"] = torch.zeros(2 * run.KV_HEADS + 1, dtype=torch.int32, device=device)
    if padded:
        options["is_token"] = torch.tensor([[True], [False]], device=device)
    if read := options.get("pages"):
        options["bounds"] = layer[0].new_zeros(2, run.KV_HEADS, read.of(254), 2, run.DIM)
    if clustered:
        options["prepared"] = torch.full((2, run.KV_HEADS), 160, dtype=torch.int32, device=device)
    pinned = NEVER_OVERWRITTEN if clustered or "starts" in options else 4
    decode.cache_decode(CacheDecodeCall(*run.step(2, device), *layer, pinned=pinned, **options))


def _of_codes(device: str, codes: str, tokens: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """A layer of 254 slots that holds tokens as codes, and what ops are told of them."""
    keys, values, more = buffers(2, 2, 254, codes, torch.bfloat16, dims=(run.DIM, run.DIM))
    state = [t.to(device) for t in (keys, values, *counters(2, 2, 254))]
    more = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in more.items()}
    key, value = torch.randn(2, 2, 2, tokens, run.DIM, device=device).to(torch.bfloat16)
    how = {"pinned": NEVER_OVERWRITTEN, "recent": 0, "empty": True, "policy": policies.make("full").describe()}
    reference.cache_store(CacheStoreCall(None, key, value, *state, scale=1.0, softcap=0.0, **how, **more))
    return state, more


def _tokens(device: str, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, count, heads, run.DIM, device=device).to(torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))


def one_of_codes(device: str, codes: str, pages: Pages | None = None) -> None:
    """Of a group that is full, and becomes codes, and one that is not."""
    state, more = _of_codes(device, codes, 190)
    if pages is not None:
        more |= {"pages": pages, "bounds": state[0].new_zeros(2, 2, pages.of(254), 2, run.DIM, dtype=torch.bfloat16)}
    for _ in range(4):
        quantised.cache_decode(CacheDecodeCall(*_tokens(device, 1), *state, pinned=NEVER_OVERWRITTEN, **_OPTIONS, **more))


def several_of_codes(device: str, count: int, codes: str) -> None:
    state, more = _of_codes(device, codes, 190)
    query, key, value = _tokens(device, count)
    append.cache_attention(CacheAttentionCall(query, *state[:3], state[4], new_key=key, new_value=value, **_OPTIONS, **more))


def bounds_of_pages(device: str) -> None:
    (keys, _, positions, counts, _, _), _ = _filled(device, 200, {})
    bounds = keys.new_zeros(2, run.KV_HEADS, 16, 2, run.DIM)
    pages.cache_bounds(CacheBoundsCall(keys, positions, bounds, since=counts // 2, size=16))


def taken_back(device: str) -> None:
    layers = [Counters(*run.state(2, capacity, 200, device)[2:]) for capacity in (254, 200)]
    take_back.by_kernel(torch.tensor(5, device=device), layers, 7, Places())


def several(device: str, count: int, padded: bool = False, held: int = 1000, **options: Any) -> None:
    (keys, values, positions, _, seen, _), options = _filled(device, held, options)
    query, key, value = (torch.randn(2, count, heads, run.DIM, dtype=keys.dtype, device=device).transpose(1, 2) for heads in (32, 8, 8))
    if padded:
        options["is_token"] = torch.rand(2, count, device=device) > 0.3
    append.cache_attention(CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, **options))


def scores(device: str, queries: int, softcap: float = 0.0) -> None:
    make = lambda heads, count: torch.randn(2, heads, count, run.DIM, dtype=torch.bfloat16, device=device)
    at = torch.arange(1001, dtype=torch.int32, device=device)
    positions, asked = at.expand(2, run.KV_HEADS, -1), at[-queries:].expand(2, -1)
    call = CacheMassCall(make(run.HEADS, queries), make(run.KV_HEADS, 1001), positions, asked, scale=0.1, softcap=softcap)
    mass.cache_mass(call)
