"""Every attention of every family is found, described, and its description reproduces what the graph computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from tests.support.cases import every
from tests.support.harness import holding
from tests.support.soundness import Capture
from tests.support.tiny_models import CORE_FAMILIES, EAGER_ONLY, FAMILIES, VOCAB, build

LENGTH = 12


def prompt(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def padding(side: str, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(length - 3, length)] = 0
    return mask


def prefill(model, capture, dynamic, **inputs):
    torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)(prompt(), **inputs)


def phases():
    """name -> function(model, capture, dynamic)."""

    def plain(model, capture, dynamic):
        prefill(model, capture, dynamic, use_cache=False)

    def cached(model, capture, dynamic):
        prefill(model, capture, dynamic)

    def left(model, capture, dynamic):
        prefill(model, capture, dynamic, attention_mask=padding("left"))

    def right(model, capture, dynamic):
        prefill(model, capture, dynamic, attention_mask=padding("right"), use_cache=False)

    def packed(model, capture, dynamic):
        positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None].repeat(2, 1)
        prefill(model, capture, dynamic, position_ids=positions, use_cache=False)

    def continued(model, capture, dynamic, tokens, mask):
        cache = DynamicCache(config=model.config)
        model(prompt(), **holding(cache))
        mask = torch.cat([mask, mask.new_ones(2, tokens)], 1) if mask is not None else None
        compiled = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)
        compiled(prompt(2, tokens), **holding(cache), attention_mask=mask)

    def static(model, capture, dynamic, mask):
        cache = StaticCache(config=model.config, max_cache_len=32)
        compiled = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=True)
        tokens = prompt()
        for _ in range(3):
            compiled(tokens, **holding(cache), attention_mask=mask)
            tokens = tokens[:, -1:]
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1) if mask is not None else None

    def generate(model, capture, dynamic, cache):
        model.compile(backend=capture, dynamic=dynamic)
        model.generate(prompt(), attention_mask=padding("left"), max_new_tokens=4, do_sample=False, cache_implementation=cache)

    return {
        "prefill": plain,
        "prefill_cached": cached,
        "left_padded": left,
        "right_padded": right,
        "packed": packed,
        "chunk": lambda *a: continued(*a, 5, None),
        "chunk_padded": lambda *a: continued(*a, 5, padding("left")),
        "decode": lambda *a: continued(*a, 1, None),
        "decode_padded": lambda *a: continued(*a, 1, padding("left")),
        "static_cache": lambda *a: static(*a, None),
        "static_cache_padded": lambda *a: static(*a, padding("left")),
        "generate": lambda *a: generate(*a, None),
        "generate_static": lambda *a: generate(*a, "static"),
    }


PHASES = phases()
ALWAYS_PROVED = [p for p in PHASES if p != "generate_static"]


def run(family: str, phase: str, attention: str = "sdpa", dynamic: bool | None = None, layers: int = 1) -> Capture:
    torch._dynamo.reset()
    capture = Capture()
    with torch.no_grad():
        PHASES[phase](build(family, attention, layers), capture, dynamic)
    assert len(capture.flat) == layers * len(capture.sites), "one site per layer and graph"
    return capture


def layers_of(family: str) -> int:
    return 2 if family in ("gemma3", "gemma2", "gpt_oss") else 1  # windowed and full layers alternate


# tests/models/test_matrix.py runs every family; here are the ways to run one
QUICK = {
    "llama": ALWAYS_PROVED,
    "mistral_window": ["packed", "chunk_padded", "static_cache_padded"],
    "gemma3": ["left_padded", "static_cache_padded"],
}
CORE = [(f, p) for f in CORE_FAMILIES for p in QUICK.get(f, [])]
CORE_SLOW = [(f, p) for f in CORE_FAMILIES for p in ALWAYS_PROVED if (f, p) not in CORE]


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def all_described(capture: Capture) -> None:
    assert not [s.near_miss or s.mask.reason for s in capture.flat if s.near_miss or s.mask.opaque]
    assert len(capture.checked) >= len(capture.flat)


@pytest.mark.parametrize(("family", "phase"), CORE + [pytest.param(*c, marks=pytest.mark.slow) for c in CORE_SLOW])
@pytest.mark.samples(6)
def test_core_families_are_proved(family, phase):
    all_described(run(family, phase, layers=layers_of(family)))


@pytest.mark.parametrize("phase", ["left_padded", "chunk_padded", "static_cache", *slow("decode_padded", "generate")])
@pytest.mark.parametrize("family", ["llama", *slow("mistral_window", "gemma3")])
@pytest.mark.samples(1)
def test_symbolic_sizes(family, phase):
    all_described(run(family, phase, dynamic=True, layers=layers_of(family)))


def test_static_cache_under_generate_hands_over_an_opaque_mask():
    """Several rows of it are opaque; one row is no more than visible keys."""
    capture = run("mistral_window", "generate_static")
    assert len(capture.sites) == 2
    assert set(capture.masks) == {"opaque: the mask is an input of the graph", "padding"}


BREADTH = [f for f in FAMILIES if f not in CORE_FAMILIES and f not in EAGER_ONLY]
# transformers itself fails there: OPT's learned positions break the graph, Falcon's alibi does not fit a static cache
BROKEN = {("opt", "static_cache"), ("falcon_alibi", "static_cache")}


@pytest.mark.parametrize("phase", ["left_padded", *slow("prefill", "chunk", "static_cache")])
@pytest.mark.parametrize("family", ["falcon_alibi", *slow(*(f for f in BREADTH if f != "falcon_alibi"))])
def test_other_families(family, phase):
    if (family, phase) in BROKEN:
        pytest.skip("fails in transformers")
    capture = run(family, phase)
    all_described(capture)
    # its slopes and products are rounded to bfloat16: no slope times position, but a number per key
    assert all(bool(s.bias) == (family == "falcon_alibi") for s in capture.flat)


# -- written-out attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", *slow("left_padded", "chunk", "static_cache")])
@pytest.mark.parametrize("family", every(5, FAMILIES))
@pytest.mark.samples(3)
def test_eager_attention(family, phase):
    if (family, phase) in BROKEN:
        pytest.skip("fails in transformers")
    capture = run(family, phase, "eager", layers=layers_of(family))
    assert {s.source for s in capture.flat} == {"eager"}
    all_described(capture)
    assert all(s.softcap == (50.0 if family == "gemma2" else 0.0) for s in capture.flat)
    assert all((s.sink_logits is not None) == (family == "gpt_oss") for s in capture.flat)
    counted = family == "falcon_alibi" or (family == "bloom" and phase == "left_padded")  # a number per key, not slope times position
    assert all(bool(s.bias) == counted for s in capture.flat)
    assert all((s.alibi_slopes is not None) == (family == "bloom" and not counted) for s in capture.flat)


def test_layer_names():
    capture = run("llama", "prefill", layers=2)
    assert [(s.name, s.layer, s.index) for s in capture.flat] == [("model.layers.0.self_attn", 0, 0), ("model.layers.1.self_attn", 1, 1)]


# -- forms that no family of today has -----------------------------------------------------------------------------------------------


def tensors(kv_heads: int = 4, query_len: int = 6, key_len: int = 6, dim: int = 8):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(2, 4, query_len, dim), draw(2, kv_heads, key_len, dim), draw(2, kv_heads, key_len, dim)


def captured(function, *inputs, grad: bool = False) -> Capture:
    torch._dynamo.reset()
    capture = Capture()
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=capture, fullgraph=True)(*inputs)
    return capture


def causal(scores):
    q, k = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None]
    return k <= q


LOWEST = torch.finfo(torch.float32).min
GROUPINGS = {
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "repeat_interleave": lambda q, k, v: sdpa(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1)),
    "expand": lambda q, k, v: sdpa(q, grouped(k), grouped(v)),
    "expand, contiguous": lambda q, k, v: sdpa(q, grouped(k).contiguous(), grouped(v).contiguous()),
    "unsqueeze, flatten": lambda q, k, v: sdpa(q, *(x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))),
}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(x):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, 2, length, dim).reshape(batch, heads * 2, length, dim)


@pytest.mark.parametrize("name", GROUPINGS)
def test_grouped_queries_are_seen_through(name):
    capture = captured(GROUPINGS[name], *tensors(kv_heads=2))
    (site,) = capture.checked
    assert (site.query_heads, site.kv_heads, site.key.op) == (4, 2, "placeholder")


def test_one_row_without_mask_is_causal_where_its_key_was_appended():
    """Of a token and its cache; a token over another sequence (cross-attention) has no order."""
    q, k, v = tensors(query_len=1)
    attend = F.scaled_dot_product_attention
    own = lambda q, k, v: attend(q, torch.cat([k, q], dim=-2), torch.cat([v, q], dim=-2))
    assert captured(own, q, k, v).masks == ["causal"]
    assert captured(attend, q, k, v).masks == ["none"]
    before = lambda q, k, v: attend(q, torch.cat([q, k], 2), torch.cat([q, v], 2))
    assert captured(before, q, k, v).masks == ["none"]
    rows = lambda q, k, v: attend(q, torch.cat([k, q], 0), torch.cat([v, q], 0))
    assert captured(rows, q[:1], k[:1, :, :1], v[:1, :, :1]).flat[0].near_miss
    assert captured(own, *tensors()).masks == ["none"]  # several rows that all see everything


def test_one_key_head_broadcasts():
    (site,) = captured(lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]), *tensors()).checked
    assert (site.query_heads, site.kv_heads) == (4, 1)


def test_other_head_orders_are_no_groups():
    """Tiled heads and heads repeated for keys alone keep their copies."""
    (site,) = captured(lambda q, k, v: sdpa(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *tensors(kv_heads=2)).checked
    assert site.kv_heads == 4
    q, k, v = tensors(kv_heads=2)
    (site,) = captured(lambda q, k, v: sdpa(q, grouped(k), v), q, k, torch.cat([v, v], 1)).checked
    assert site.kv_heads == 4


def test_keys_written_after_their_copy_stay_a_copy():
    def function(q, k, v):
        keys, values = grouped(k), grouped(v)
        k.mul_(2.0)
        return sdpa(q, keys, values)

    (site,) = captured(function, *tensors(kv_heads=2)).checked
    assert site.kv_heads == 4


NEAR_MISSES = {
    "three dimensions": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "batch broadcast": lambda q, k, v: sdpa(q, k[:1], v[:1]),
    "query heads broadcast": lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k, v),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_every_sdpa_call_is_listed(name):
    (site,) = captured(NEAR_MISSES[name], *tensors()).flat
    assert site.near_miss and site.mask.opaque


def shifted_in_place(scores):
    scores -= scores.amax(-1, keepdim=True)
    return scores


BEFORE_SOFTMAX = {
    "in-place difference": shifted_in_place,
    "sub_": lambda scores: scores.sub_(scores.amax(-1, keepdim=True)),
    "subtract": lambda scores: torch.subtract(scores, scores.amax(-1, keepdim=True)),
    "reversed difference": lambda scores: scores.amax(-1, keepdim=True) - scores,
    "concat": lambda scores: torch.concat([scores, scores[..., :1]], -1),
    "concatenate": lambda scores: torch.concatenate((scores, scores[..., :1]), dim=-1),
}


@pytest.mark.parametrize("name", BEFORE_SOFTMAX)
def test_every_written_out_attention_is_listed(name):
    """What is done to the scores on the way may be unknown; that there is an attention is told all the same."""

    def attend(q, k, v):
        weights = torch.softmax(BEFORE_SOFTMAX[name](q @ k.transpose(2, 3)), -1)
        return weights[..., : v.shape[-2]] @ v

    q, k, v = tensors()
    heads = q.shape[1] // k.shape[1]
    (site,) = captured(attend, q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)).flat
    assert site.near_miss


def test_gradients_and_dropout_are_reported():
    q, k, v = tensors()
    assert not captured(sdpa, q, k, v, grad=True).flat[0].needs_grad
    assert captured(sdpa, q.requires_grad_(), k, v, grad=True).flat[0].needs_grad
    q, k, v = tensors()
    assert not captured(sdpa, q.requires_grad_(), k, v).flat[0].needs_grad
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch._dynamo.reset()
    capture = Capture(tolerance=float("inf"))
    torch.compile(function, backend=capture, fullgraph=True)(*tensors())
    assert capture.flat[0].dropout == 0.25


def test_strides():
    q, k, v = tensors()
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert captured(sdpa, *heads_last).checked[0].output_stride_order in ("bqhd", "bhqd")


def weights(q, k, mask=True):
    scores = q @ k.transpose(-1, -2) * 0.3
    return torch.softmax(scores.masked_fill(~causal(scores), LOWEST) if mask else scores, -1)


def scaled_in_place(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3))
    scores /= 3.0
    scores += torch.where(causal(scores), 0.0, LOWEST)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def capped(q, k, v):
    scores = torch.tanh((q @ k.permute(0, 1, 3, 2)) / 4.0) * 4.0
    return F.softmax(torch.where(causal(scores), scores, float("-inf")), -1) @ v


def maximum_subtracted(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores + torch.where(causal(scores), 0.0, LOWEST)
    return torch.softmax(scores - scores.max(-1, keepdim=True)[0], -1) @ v


def alibi(q, k, v):
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, 5))
    scores = q @ k.transpose(-1, -2) * 0.3 + slopes[:, None, None] * torch.arange(1 - k.shape[2], 1)[None, None]
    return torch.softmax(scores.masked_fill(~causal(scores), LOWEST), -1) @ v


def counted_alibi(q, k, v):
    """As Bloom in transformers 5.17: positions counted from a mask of ones, batch and heads merged."""
    batch, heads, length, dim = q.shape
    slopes = torch.pow(torch.tensor(0.5), torch.arange(1, 5))
    positions = (torch.ones(batch, length, dtype=torch.int64).cumsum(-1) - 1)[:, None]
    bias = (slopes[..., None] * positions).reshape(batch * heads, 1, length)
    flat = lambda x: x.reshape(batch * heads, length, dim)
    scores = bias.baddbmm(flat(q), flat(k).transpose(-1, -2), beta=1.0, alpha=0.3).view(batch, heads, length, length)
    return torch.softmax(scores + torch.where(causal(scores), 0.0, LOWEST), -1) @ v


def sinks(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.3
    scores = scores + torch.where(causal(scores), 0.0, LOWEST)
    column = q[0, :, 0, 0].clone().reshape(1, -1, 1, 1).expand(2, -1, 6, -1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


MATCHES = {
    "masked_fill": lambda q, k, v: weights(q, k) @ v,
    "no mask": lambda q, k, v: weights(q, k, mask=False) @ v,
    "in place": scaled_in_place,
    "softcap": capped,
    "maximum subtracted": maximum_subtracted,
    "dropout off": lambda q, k, v: F.dropout(weights(q, k), 0.5, False) @ v,
    "slopes": alibi,
    "counted slopes": counted_alibi,
    "sinks": sinks,
    "one key head": lambda q, k, v: weights(q, k[:, :1]) @ v[:, :1],
    "grouped": lambda q, k, v: weights(q, grouped(k[:, :2])) @ grouped(v[:, :2]),
    "keys that are no transpose": lambda q, k, v: torch.softmax(q @ k[..., :6].reshape(2, 4, 6, 6).repeat(1, 1, 2, 1)[:, :, :8], -1) @ v,
    "no scale": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
}


@pytest.mark.parametrize("name", MATCHES)
def test_written_out_forms(name):
    capture = captured(MATCHES[name], *tensors())
    assert [s.near_miss or s.mask.reason for s in capture.flat] == [""]
    assert len(capture.checked) == 1


def with_weights(q, k, v):
    probabilities = weights(q, k)
    return probabilities @ v, probabilities


def edited(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.3
    scores[..., 0] = 1.0
    return torch.softmax(scores, -1) @ v


def edited_keys(q, k, v):
    probabilities = weights(q, k)
    k.zero_()
    return probabilities @ v


MUST_NOT_MATCH = {
    "weights returned": with_weights,
    "weights doubled": lambda q, k, v: (weights(q, k) * 2) @ v,
    "weights summed": lambda q, k, v: (p := weights(q, k)) @ v + p.sum(),
    "scores edited": edited,
    "keys written": edited_keys,
    "softmax over queries": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), 2) @ v,
    "transposed weights": lambda q, k, v: weights(q, k).transpose(-1, -2) @ v,
    "scaled per head": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * q[0, :, :1, :1], -1) @ v,
    "random bias": lambda q, k, v: (
        torch.softmax(q @ k.transpose(-1, -2) + torch.where(causal(q @ k.transpose(-1, -2)), 0.0, LOWEST) + v[:, :, :, :6], -1) @ v
    ),
    "weakly hidden": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~causal(q @ k.transpose(-1, -2)), -3.0), -1) @ v,
    "a column kept": lambda q, k, v: (
        torch.softmax(torch.cat([q @ k.transpose(-1, -2), q[..., :1]], -1), -1) @ torch.cat([v, v[:, :, :1]], 2)
    ),
    "a column dropped": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1)[..., :-1] @ v[:, :, :-1],
}


# numbers that scores may reach hide nothing for certain: what adds them is a bias
ADDED = {
    "before the scale": lambda q, k, v: torch.softmax((q @ k.mT + torch.where(causal(q @ k.mT), 0.0, -1e3)) * 0.3, -1) @ v,
    "few": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(causal(q @ k.mT), 0.0, -3.0)),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_scores_may_reach_is_a_bias(name):
    capture = captured(ADDED[name], *tensors())
    assert [len(site.bias) for site in capture.flat] == [1] and not any(site.near_miss for site in capture.flat)


@pytest.mark.parametrize("name", MUST_NOT_MATCH)
def test_must_not_match(name):
    capture = captured(MUST_NOT_MATCH[name], *tensors())
    assert all(s.near_miss or s.mask.opaque for s in capture.flat), capture.masks
    assert not capture.checked
