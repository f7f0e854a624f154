"""Figures of what a cache that evicts costs in answers."""

from __future__ import annotations

from typing import Any

from benchmarks.cache import EvictionNeedles
from benchmarks.lib.needles import wilson
from sparsify.commands.bench.tables import Found, kind, latest, newest_device, size


def eviction(found: list[Found]) -> Any:
    """Answers right over the share of the longest prompt that is kept per KV head, a line a policy, with 95 % intervals."""
    from matplotlib import pyplot

    usual = {"kernel": 5}  # early records do not say that SnapKV's smoothing was the paper's
    known = [usual | {name: value for name, value in one.items() if value is not None} for one in kind(found, EvictionNeedles)]
    cells = latest(newest_device(known), EvictionNeedles)
    if not cells:
        return None
    longest = max(one["length"] for one in cells)
    cells = [one for one in cells if one["length"] == longest]
    named = lambda one: one["policy"] + (f", scores smoothed over {one['kernel']} tokens" if one["policy"] == "snapkv" else "")
    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, marker in zip(sorted(set(map(named, cells))), "osD^v*", strict=False):
        points = sorted((one["share"], one["right"], one["asked"]) for one in cells if named(one) == name)
        shares, right = [share for share, _, _ in points], [good / asked for _, good, asked in points]
        ends = [wilson(good, asked) for _, good, asked in points]
        below = [at - low for at, (low, _) in zip(right, ends, strict=True)]
        above = [high - at for at, (_, high) in zip(right, ends, strict=True)]
        axis.errorbar(shares, right, yerr=[below, above], marker=marker, capsize=3, label=name)
    shares = sorted({one["share"] for one in cells})
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.minorticks_off()
    axis.set(xlabel="share of the prompt kept per KV head", ylabel="answers right", ylim=(-0.02, 1.02))
    axis.set_title(f"one fact in {size(longest)} bytes, asked for at the end", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
