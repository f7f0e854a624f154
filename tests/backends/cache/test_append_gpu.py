"""Kernels for calls of several tokens over a cache, and for scoring what stays, on a real GPU."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.cache import reference
from sparsify.backends.cache.append import cache_attention
from sparsify.backends.cache.mass import cache_mass
from sparsify.ops.cache import CacheAttentionCall, CacheMassCall
from tests.backends.cache.test_decode_gpu import layer
from tests.backends.cache.test_decode_interpreted import TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CLAUSES = {
    "plain": {},
    "window": {"window": 296, "sinks": 4},
    "rotated": {"window": 296, "sinks": 4, "inverse_frequencies": True},
    "logits": {"softcap": 20.0, "sink_logits": True},
}


@pytest.mark.parametrize("clause", list(CLAUSES))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "dim, group, dtype", [(128, 4, torch.bfloat16), (64, 7, torch.float16), (256, 1, torch.bfloat16), (80, 2, torch.float32)]
)
@pytest.mark.parametrize("count, capacity, tokens", [(5, 20000, (30000, 12345)), (700, 300, (0, 299))])
def test_against_the_reference(count, capacity, tokens, dim, group, dtype, padded, clause):
    torch.manual_seed(0)
    keys, values, positions, _, seen, _ = layer(2, 2, capacity, dim, dtype, tokens, 4)
    make = lambda heads: torch.randn(2, count, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    query, key, value = make(2 * group), make(2), make(2)
    options = {"scale": dim**-0.5, "softcap": 0.0, "window": 0, "sinks": 0} | CLAUSES[clause]
    if "sink_logits" in options:
        options["sink_logits"] = torch.randn(2 * group, device="cuda")
    if "inverse_frequencies" in options:
        options["inverse_frequencies"] = 1 / 10000 ** torch.linspace(0, 1, dim // 2, device="cuda")
    is_token = torch.rand(2, count, device="cuda") > 0.2 if padded else None
    call = CacheAttentionCall(query, keys, values, positions, seen, new_key=key, new_value=value, is_token=is_token, **options)
    want, got = reference.cache_attention(call), cache_attention(call)
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(
    "dim, group, queries, dtype", [(128, 4, 32, torch.bfloat16), (64, 7, 12, torch.float16), (80, 1, 70, torch.float32)]
)
@pytest.mark.parametrize("count", [100, 33000])
def test_what_keys_get_of_the_queries(count, dim, group, queries, dtype, softcap):
    torch.manual_seed(0)
    make = lambda heads, size: torch.randn(2, size, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    query, keys = make(2 * group, queries), make(2, count)
    is_token = torch.rand(2, 1, count, device="cuda") > 0.1
    positions = torch.where(is_token, is_token.cumsum(-1) - 1, -1).to(torch.int32).expand(-1, 2, -1)
    asked = (positions[:, 0].amax(-1, keepdim=True) - queries + 1 + torch.arange(queries, device="cuda")).to(torch.int32)
    call = CacheMassCall(query, keys, positions, asked, scale=dim**-0.5, softcap=softcap)
    want, got = reference.cache_mass(call), cache_mass(call)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, atol=bound * float(want.max()), rtol=bound)
