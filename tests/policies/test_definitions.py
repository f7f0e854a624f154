"""What each policy scores, against its paper's definition, one head and one key at a time."""

from __future__ import annotations

import math

import pytest
import torch

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import policies
from sparsify.errors import ConfigError
from sparsify.policies import Candidates, LayerFacts
from sparsify.policies.snapkv import SnapKV

COUNT, PADDING, GROUP, SCALE = 30, 5, 2, 0.3


@pytest.fixture
def candidates() -> Candidates:
    """Behind PADDING slots that are no token and hold NaN, COUNT tokens of two KV heads; queries of all of them."""
    torch.manual_seed(4)
    keys = torch.randn(1, 2, PADDING + COUNT, 8)
    keys[:, :, :PADDING] = torch.nan
    at = torch.cat((torch.full((PADDING,), -1), torch.arange(COUNT))).to(torch.int32)
    queries = torch.randn(1, 2 * GROUP, COUNT, 8)
    return Candidates(
        keys, keys, at.expand(1, 2, -1), queries, torch.arange(COUNT, dtype=torch.int32)[None], torch.tensor([COUNT - 1]), SCALE, 0.0
    )


def observed_by(policy: policies.Policy, all_of_them: Candidates) -> Candidates:
    """As the store op hands candidates to a policy: with as many of the last queries as it asks for."""
    last = slice(-policy.observed, None) if policy.observed else slice(0, 0)
    queries, positions = all_of_them.queries, all_of_them.query_positions
    assert queries is not None and positions is not None
    given = (queries[:, :, last], positions[:, last]) if policy.observed else (None, None)
    return Candidates(all_of_them.keys, all_of_them.values, all_of_them.positions, *given, all_of_them.newest, SCALE, 0.0)


def scores(name: str, all_of_them: Candidates, **options: object) -> torch.Tensor:
    """Of the tokens, [kv_heads, COUNT]."""
    policy = policies.make(name, **options).bind(LayerFacts(0, 1, lambda: torch.tensor([1.0, 0.3, 0.1])))
    return policy.score(observed_by(policy, all_of_them))[0, :, PADDING:]


def attention(all_of_them: Candidates, head: int, query: int) -> list[float]:
    """Weights of one query of one query head, by key; 0 for those behind it."""
    assert all_of_them.queries is not None
    rows, keys = all_of_them.queries[0, head, query], all_of_them.keys[0, head // GROUP, PADDING:]
    seen = [math.exp(SCALE * float(rows @ keys[k])) for k in range(query + 1)]
    return [x / sum(seen) for x in seen] + [0.0] * (COUNT - query - 1)


def test_knorm_is_the_negated_length_of_keys(candidates):
    want = [[-math.sqrt(sum(x * x for x in key.tolist())) for key in head] for head in candidates.keys[0, :, PADDING:]]
    torch.testing.assert_close(scores("knorm", candidates), torch.tensor(want))


def test_keydiff_is_the_negated_cosine_to_the_mean_direction(candidates):
    want = []
    for head in candidates.keys[0, :, PADDING:]:
        directions = [key / key.norm() for key in head]
        anchor = sum(directions) / COUNT
        want.append([-float(torch.cosine_similarity(key, anchor, dim=0)) for key in head])
    torch.testing.assert_close(scores("keydiff", candidates), torch.tensor(want))


def test_tova_is_the_last_querys_attention_on_the_mean_of_all_heads(candidates):
    by_head = [attention(candidates, head, COUNT - 1) for head in range(2 * GROUP)]
    want = torch.tensor([sum(weights) / len(by_head) for weights in zip(*by_head, strict=True)])
    torch.testing.assert_close(scores("tova", candidates), want.expand(2, -1))


def test_h2o_is_the_attention_of_all_queries_together(candidates):
    want = torch.zeros(2, COUNT)
    for head in range(2 * GROUP):
        for query in range(COUNT):
            want[head // GROUP] += torch.tensor(attention(candidates, head, query)) / GROUP
    torch.testing.assert_close(scores("h2o", candidates), want)
    layout = policies.make("h2o").layout(20)
    assert (layout.pinned, layout.recent) == (10, 10), "half for heavy hitters, half for the last tokens"


@pytest.mark.parametrize(("of", "options"), [("knorm", {"recent": 4}), ("snapkv", {"window": 4, "kernel": 3})])
def test_chunkkv_is_the_mean_over_runs_of_tokens(candidates, of, options):
    inner = scores(of, candidates, **options)
    want = torch.stack([torch.cat([run.mean().expand(len(run)) for run in head.split(7)]) for head in inner])
    torch.testing.assert_close(scores("chunkkv", candidates, of=of, options=options, chunk=7), want)
    assert policies.make("chunkkv", of=of, options=options).layout(20) == policies.make(of, **options).layout(20)


def test_chunkkv_counts_runs_by_position_after_an_eviction(candidates):
    """Of tokens 0..29 the even ones are left: a run of 10 positions then has 5 tokens."""
    left = [i for i in range(PADDING + COUNT) if i < PADDING or (i - PADDING) % 2 == 0]
    at = candidates.positions[..., left]
    fewer = Candidates(candidates.keys[:, :, left], candidates.values[:, :, left], at, None, None, candidates.newest, SCALE, 0.0)
    found = policies.make("chunkkv", of="knorm", chunk=10).score(fewer)[0, :, PADDING:]
    inner = policies.make("knorm").score(fewer)[0, :, PADDING:]
    torch.testing.assert_close(found, torch.stack([torch.cat([r.mean().expand(5) for r in head.split(5)]) for head in inner]))


def test_what_is_no_token_counts_nowhere(candidates):
    """The slots' NaN reach no token's score."""
    for name in policies.discover():
        if name not in ("full", "streaming_llm", "sirllm", "duo", "locret"):  # sirllm reads no keys, locret only its heads' scores
            options = {"sinks": 0} if name == "expected_attention" else {}  # sinks score inf
            assert scores(name, candidates, **options).isfinite().all(), name


def test_chunkkv_refuses_what_it_cannot_join():
    for options, message in (
        ({"of": "chunkkv"}, "scores no tokens"),
        ({"of": "streaming_llm"}, "scores no tokens"),
        ({"of": "snapkw"}, "no policy 'snapkw'.*snapkv"),
        ({"of": "snapkv", "options": {"kernel": 4}}, "odd"),
    ):
        with pytest.raises(ConfigError, match=message):
            policies.make("chunkkv", **options)
    with pytest.raises(ConfigError, match="cannot be split"):
        policies.make("h2o").layout(1)
    with pytest.raises(ConfigError, match="none beside the last one"):
        policies.make("tova").layout(1)


# --- SnapKV ---


def snapkv_by_hand(policy, keys, queries, scale, group):
    """Scores of the keys before the window, one head and one key at a time, from the paper's listing."""
    heads, count, _ = keys.shape
    width, scores = policy.kernel or (5 if policy.pool == "avg" else 7), []
    for h in range(heads):
        per_query_head = []
        for g in range(group):
            mass = [0.0] * (count - policy.window)
            for w in range(policy.window):
                last = count - policy.window + w
                logits = [float(queries[h * group + g, w] @ keys[h, k]) * scale for k in range(last + 1)]
                total = sum(math.exp(x - max(logits)) for x in logits)
                for k in range(len(mass)):
                    mass[k] += math.exp(logits[k] - max(logits)) / total
            half = width // 2
            near = [mass[max(0, k - half) : k + half + 1] for k in range(len(mass))]
            per_query_head.append([sum(n) / width if policy.pool == "avg" else max(n) for n in near])
        combine = (lambda x: sum(x) / len(x)) if policy.group == "mean" else max
        scores.append([combine(x) for x in zip(*per_query_head, strict=True)])
    return torch.tensor(scores)


@pytest.mark.parametrize("group_by", ["mean", "max"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("group", [1, 4])
def test_snapkv_equals_the_paper_by_hand(pool, group_by, group):
    torch.manual_seed(1)
    policy = SnapKV(window=4, pool=pool, group=group_by)
    keys, queries = torch.randn(1, 2, 25, 8), torch.randn(1, 2 * group, 4, 8)
    at = torch.arange(25, dtype=torch.int32)
    found = policy.score(Candidates(keys, keys, at.expand(1, 2, -1), queries, at[None, -4:], torch.tensor([24]), 0.3, 0.0))
    want = snapkv_by_hand(policy, keys[0], queries[0], 0.3, group)
    torch.testing.assert_close(found[0, :, :21], want, rtol=1e-4, atol=1e-6)
