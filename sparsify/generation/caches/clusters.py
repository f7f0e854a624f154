"""A fixed prefix in clusters: its keys are put into an order in which those of one page are alike, once, after which tokens read the pages
whose means are near to them (Squeezed Attention, Hooper et al., arXiv 2411.09688).

Clusters are found by 2-means, again and again: a set of keys is cut into two halves, each of whole pages, by the direction in which its
halves' means differ most, until each part is one page. So every cluster has as many keys as a page has slots, a page is nobody else's, and
the parts on the way are the coarse clusters of the hierarchy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsify.ops.limits import cdiv
from sparsify.ops.pages import GROUP, Clusters

# a `layer.SparseLayer`, whose module uses this one
SparseLayer = Any
# steps of a 2-means, each a mean of either half and a new cut
_STEPS = 4


def prepare(layer: SparseLayer) -> None:
    """Puts what a layer holds into clusters, but for the first and the newest tokens that its `read` names. Reads counts from the device.

    Args:
        layer: allocated, with `read` of Clusters, between two calls; its keys are where they can be changed.
    """
    pages: Clusters = layer.read
    counts = layer.counts.clamp(max=layer.keys.shape[2]).tolist()
    for row, held in enumerate(counts):
        for head, count in enumerate(held):
            where = row, head
            order = layer.positions[where][:count].argsort()
            first, end = pages.first, max(0, count - pages.recent) // pages.size
            clusters = end - first > 1
            if clusters:
                part = slice(first * pages.size, end * pages.size)
                order[part] = order[part][arranged(layer.keys[where][order[part]].float(), pages.size, first)]
            for state in (layer.keys, layer.values, layer.positions):
                state[where][:count] = state[where][order]
            layer.prepared[where] = end * pages.size if clusters else 0
            layer.counts[where] = count


def arranged(keys: Tensor, size: int, first: int = 0) -> Tensor:
    """The order in which neighbouring keys make clusters of `size`, int64 [n].

    Args:
        keys: fp32 [n, head_dim], n a multiple of `size`.
        first: number of the first page; groups of pages begin at multiples of `GROUP`.
    """
    order = torch.arange(len(keys), device=keys.device)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(keys),), generator=generator).to(keys.device, torch.float64) * 2 - 1
    for cuts, parts in _levels(first, first + len(keys) // size):
        at = [cut * size for cut in cuts]
        order = order[_cut(keys[order], signs, torch.tensor(at, device=keys.device), torch.tensor(parts, device=keys.device))]
    return order


@functools.lru_cache(maxsize=8)  # the heads of all layers hold as many tokens
def _levels(begin: int, end: int) -> tuple[tuple[list[int], list[int]], ...]:
    """How pages [begin, end) are halved again and again: of each time where the parts begin and the last one ends, counted from the first
    page, and of each set how many parts it becomes."""
    found, spans = [], [(begin, end)]
    while any(last - first > 1 for first, last in spans):
        parts = [_halves(*span) for span in spans]
        spans = [half for halves in parts for half in halves]
        found.append(([first - begin for first, _ in spans] + [end - begin], [len(halves) for halves in parts]))
    return tuple(found)


def _halves(begin: int, end: int) -> list[tuple[int, int]]:
    """Pages [begin, end) as two parts that do not cut through a group unless they lie in one."""
    if end - begin < 2:
        return [(begin, end)]
    middle = (begin + end) // 2
    if begin // GROUP != (end - 1) // GROUP:
        middle = (middle + GROUP // 2) // GROUP * GROUP
        middle += GROUP * ((middle <= begin) - (middle >= end))
    return [(begin, middle), (middle, end)]


def _cut(keys: Tensor, signs: Tensor, cuts: Tensor, parts: Tensor) -> Tensor:
    """The order in which each set of neighbouring keys is cut by 2-means.

    Args:
        keys: fp32 [n, head_dim].
        signs: random, fp64 [n].
        cuts: ascending, where the parts begin and the last one ends.
        parts: of each set, 2 or, of one that stays, 1.
    """
    keys = keys.double()
    sizes = cuts[1:] - cuts[:-1]
    owner = torch.arange(len(parts), device=keys.device).repeat_interleave(parts)  # of each part its set
    begin = torch.cumsum(parts, 0) - parts  # of each set its first part
    other = begin + parts - 1
    sets = owner.repeat_interleave(sizes)  # of each place its set
    whole = torch.zeros(len(parts), dtype=sizes.dtype, device=keys.device).index_add(0, owner, sizes)
    ends = torch.cumsum(whole, 0)
    around = torch.cat((ends[:1] * 0, ends))
    centre = _sums(keys, around) / whole[:, None]
    direction = _sums((keys - centre[sets]) * signs[:, None], around)
    for _ in range(_STEPS):
        along = (keys * direction[sets]).sum(-1)
        means = _sums(keys[_by_set(along, sets)], cuts) / sizes[:, None]
        direction = means[other] - means[begin]
    return _by_set((keys * direction[sets]).sum(-1), sets)


def _by_set(along: Tensor, sets: Tensor) -> Tensor:
    """Places by rising number, set after set."""
    order = along.argsort(stable=True)
    return order[sets[order].argsort(stable=True)]


def _sums(rows: Tensor, cuts: Tensor) -> Tensor:
    """Sums of neighbouring rows [n, dim], between each two of the ascending `cuts`: differences, whose order of additions is one."""
    upto = torch.cat((rows.new_zeros(1, rows.shape[1]), rows.cumsum(0)))
    return upto[cuts[1:]] - upto[cuts[:-1]]


def write_means(layer: SparseLayer) -> None:
    """Puts into `bounds` of each cluster the mean of its keys and that of its group's."""
    pages: Clusters = layer.read
    batch, kv_heads, _, dim = layer.keys.shape
    end = int(layer.prepared.max()) // pages.size
    if end <= pages.first:
        return
    keys = layer.keys[:, :, : end * pages.size].unflatten(2, (end, pages.size)).float()
    number = torch.arange(end, device=keys.device)
    clusters = (number >= pages.first) & ((number + 1) * pages.size <= layer.prepared[..., None])
    means = keys.mean(3).masked_fill(~clusters[..., None], 0)
    groups = cdiv(end, GROUP)
    sums = means.new_zeros(batch, kv_heads, groups * GROUP, dim)
    sums[:, :, :end] = means
    some = torch.zeros(batch, kv_heads, groups * GROUP, device=keys.device)
    some[:, :, :end] = clusters.float()
    coarse = sums.unflatten(2, (groups, GROUP)).sum(3) / some.unflatten(2, (groups, GROUP)).sum(3).clamp(min=1)[..., None]
    found = torch.stack((means, coarse.repeat_interleave(GROUP, 2)[:, :, :end]), 3).to(layer.bounds.dtype)
    kept = layer.bounds[:, :, :end]
    kept.copy_(torch.where(clusters[..., None, None], found, kept))
