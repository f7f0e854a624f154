"""Columns and diagonals of key blocks by their definition, and attention under the mask that they stand for."""

from __future__ import annotations

import torch

BLOCK = 64


def best(scores: list[float], always: set[int], count: int, mass: float | None) -> set[int]:
    """Those that are visited in any case, and of the others the highest: so many, or as few as hold so much of all."""
    chosen, held = set(always), sum(scores[i] for i in always)
    for i in sorted(set(range(len(scores))) - always, key=lambda i: -scores[i])[:count]:
        if mass is None or held < mass * sum(scores):
            chosen.add(i)
            held += scores[i]
    return chosen


def chosen_blocks(query, key, columns, diagonals, queries, visible=None, mass=None, blocks=None, divergence=None) -> torch.Tensor:
    """The definition, one block after the other, in float64: bool [batch, heads, query_blocks, key_blocks]."""
    batch, heads, query_len, dim = query.shape
    group, key_len = heads // key.shape[1], key.shape[2]
    start, count = key_len - query_len, -(-key_len // BLOCK)
    keep = torch.zeros(batch, heads, -(-query_len // BLOCK), count, dtype=torch.bool)
    mean = lambda tensor, which: tensor[which].double().mean(0) if which else torch.zeros(dim, dtype=torch.float64)
    for b in range(batch):
        seen = [k for k in range(key_len) if visible is None or visible[b, k]]
        rows = [r for r in range(query_len) if r + start in seen][-queries:]
        first = seen[0] // BLOCK
        inside = [[k for k in seen if k // BLOCK == j] for j in range(count)]
        for h in range(heads):
            keys, by_column, by_distance = key[b, h // group], [0.0] * count, [0.0] * count
            for row in rows:
                sees = [k for k in seen if k <= row + start]
                weights = (keys[sees].double() @ query[b, h, row].double() * dim**-0.5).softmax(0).tolist()
                for k, weight in zip(sees, weights, strict=True):
                    by_column[k // BLOCK] += weight
                    by_distance[(row + start) // BLOCK - k // BLOCK] += weight

            def by_means(asking, own, keys=keys, inside=inside):
                """What a mean query looks at by block."""
                there = [j for j in range(own + 1) if inside[j]]
                scores = [float(mean(keys, inside[j]) @ asking) * dim**-0.5 for j in there]
                found = [0.0] * count
                for j, weight in zip(there, torch.tensor(scores, dtype=torch.float64).softmax(0).tolist(), strict=True):
                    found[j] = weight
                return found

            visited = best(by_column, {first}, columns[h], mass)
            steps = best(by_distance, {*range(min(2, count))}, diagonals[h], mass)
            alone = False
            if divergence is not None and blocks[h]:
                truth = torch.tensor(by_column).double() / sum(by_column)
                guess = torch.tensor(by_means(mean(query[b, h], rows), (rows[-1] + start) // BLOCK)).double()
                middle = (truth + guess) / 2
                kl = lambda one, middle=middle: float((one[one > 0] * (one[one > 0] / middle[one > 0]).log()).sum())
                alone = ((kl(truth) + kl(guess)) / 2) ** 0.5 < divergence
                if alone:
                    visited, steps = {first}, {0, 1}
            for i in range(keep.shape[2]):
                own = (min(query_len, (i + 1) * BLOCK) - 1 + start) // BLOCK
                chosen = {*(c for c in visited if c <= own), *(own - d for d in steps if d <= own)}
                if blocks is not None and blocks[h] and (alone or divergence is None):
                    asking = [r for r in range(query_len) if r // BLOCK == i and r + start in seen]
                    always = {first, own, max(own - 1, 0)} & {*range(own + 1)}
                    chosen |= best(by_means(mean(query[b, h], asking), own)[: own + 1], always, blocks[h], mass)
                keep[b, h, i, sorted(chosen)] = True
    return keep


def masked(query, key, value, keep, visible=None):
    """Causal attention over kept blocks."""
    query_len, key_len = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows, keys = torch.arange(query_len)[:, None] + key_len - query_len, torch.arange(key_len)
    table = keep.repeat_interleave(BLOCK, 2)[:, :, :query_len].repeat_interleave(BLOCK, 3)[..., :key_len] & (keys <= rows)
    if visible is not None:
        table = table & (visible != 0)[:, None, None]
    scores = query.double() @ key.repeat_interleave(group, 1).double().mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~table, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value.repeat_interleave(group, 1).double()).to(query.dtype)
