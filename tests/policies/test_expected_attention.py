"""expected_attention against kvpress's description, with rotation matrices written out and queries that were never rotated."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from sparsify import SparseCache, policies
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.policies import Candidates, LayerFacts

COUNT, PADDING, GROUP, DIM, SCALE = 24, 3, 2, 8, 0.4
ANGLES = torch.tensor([1.0, 0.3, 0.05])  # of 8 dimensions the last two are not rotated


def matrix(position: float) -> torch.Tensor:
    """The rotation by so many positions, [DIM, DIM]."""
    found = torch.eye(DIM, dtype=torch.float64)
    for pair, angle in enumerate(ANGLES.tolist()):
        a, b, turn = pair, pair + len(ANGLES), position * angle
        found[a, a] = found[b, b] = math.cos(turn)
        found[a, b], found[b, a] = -math.sin(turn), math.sin(turn)
    return found


def expected(queries, keys, values, future, sinks, covariance, value_norm):
    """Scores of one KV head's keys behind the sinks, from unrotated queries [GROUP, COUNT, DIM]."""
    ahead = sum(matrix(COUNT + step) for step in range(future)) / future
    by_head = []
    for rows in queries:
        rows = rows[sinks:]
        mean = rows.mean(0)
        spread = sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)
        mean, spread = ahead @ mean, ahead @ spread @ ahead.T
        logits = [SCALE * mean @ key + (SCALE**2 * key @ spread @ key / 2 if covariance else 0) for key in keys[sinks:]]
        by_head.append(torch.stack(logits).softmax(0))
    weight = sum(by_head) / len(by_head)
    return weight * values[sinks:].norm(dim=-1) if value_norm else weight


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize(("value_norm", "sinks", "offset"), [(True, 4, 0), (False, 0, 0), (True, 2, 5)])
def test_it_is_the_expected_weight_times_the_length_of_values(covariance, value_norm, sinks, offset):
    """offset: of the model's positions against those that count tokens; it does not matter."""
    torch.manual_seed(2)
    plain = torch.randn(2 * GROUP, COUNT, DIM, dtype=torch.float64)
    plain_keys = torch.randn(2, COUNT, DIM, dtype=torch.float64)
    values = torch.randn(2, COUNT, DIM, dtype=torch.float64)
    turn = lambda rows, by: torch.stack([torch.stack([matrix(i + by) @ row for i, row in enumerate(head)]) for head in rows])
    at = torch.cat((torch.full((PADDING,), -1), torch.arange(COUNT))).to(torch.int32)
    padded = lambda rows: torch.cat((torch.full((2, PADDING, DIM), torch.nan), rows.float()), 1)[None]
    policy = policies.make("expected_attention", covariance=covariance, value_norm=value_norm, sinks=sinks, future=16)
    policy = policy.bind(LayerFacts(0, 1, lambda: ANGLES))
    queries = turn(plain, offset).float()[None]
    candidates = Candidates(
        padded(turn(plain_keys, offset)),
        padded(values),
        at.expand(1, 2, -1),
        queries,
        at[None, PADDING:],
        torch.tensor([COUNT - 1]),
        SCALE,
        0.0,
    )
    found = policy.score(candidates)[0, :, PADDING:]
    assert torch.equal(found.isinf(), (torch.arange(COUNT) < sinks).expand(2, -1)), "sinks stay, and nothing else must"
    for head in range(2):
        group = plain[head * GROUP : (head + 1) * GROUP]
        want = expected(group, turn(plain_keys, 0)[head], values[head], 16, sinks, covariance, value_norm)
        torch.testing.assert_close(found[head, sinks:].double(), want, rtol=1e-4, atol=1e-6)


def test_it_is_bound_to_a_rotary_embedding_that_is_known():
    zeros = torch.zeros(1, 1, 2, 4)
    alone = Candidates(zeros, zeros, zeros[..., 0], zeros, zeros[:, 0, :, 0], torch.ones(1), 1.0, 0.0)
    with pytest.raises(ConfigError, match="frequencies are not known"):
        policies.make("expected_attention").score(alone)
    config = LlamaConfig(num_hidden_layers=1, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedError, match="cannot turn queries back under 'dynamic'"):
        SparseCache(config, "expected_attention", 64)
