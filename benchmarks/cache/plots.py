"""Figures of what a cache that evicts costs in answers."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.cache import EvictionAnswers
from benchmarks.lib.needles import wilson
from sparsify.commands.bench.tables import Found, kind, latest, newest_device, size

_PANELS = {"end": "asked before the policy chooses", "blind": "asked after it has chosen"}


def eviction(found: list[Found]) -> Any:
    """Answers right over the share of the text that is kept or read, a line a policy, with 95 % intervals: a row of panels for each length,
    the longest first, a column for questions that the policy knows, one for those that it does not."""
    from matplotlib import pyplot

    cells = latest(newest_device(kind(found, EvictionAnswers)), EvictionAnswers)
    if not cells:
        return None
    mean = lambda name: sum(one["right"] / one["questions"] for one in cells if one["policy"] == name and one["asked"] in _PANELS)
    names = sorted({one["policy"] for one in cells} - {"full"}, key=lambda name: (-mean(name), name))
    colours, markers = pyplot.get_cmap("tab20"), itertools.cycle("osD^v*PX")
    styles = {name: {"color": colours(number % 20), "marker": marker} for number, (name, marker) in enumerate(zip(names, markers))}
    lengths = sorted({one["length"] for one in cells}, reverse=True)
    size_of = {"figsize": (12.5, 5.4 * len(lengths)), "sharey": True, "layout": "constrained", "squeeze": False}
    figure, rows = pyplot.subplots(len(lengths), len(_PANELS), **size_of)
    for length, axes in zip(lengths, rows, strict=True):
        for axis, (asked, title) in zip(axes, _PANELS.items(), strict=True):
            _panel(axis, [one for one in cells if (one["length"], one["asked"]) == (length, asked)], styles)
            axis.set_title(f"facts in {size(length)} bytes, {title}", fontsize=10)
        axes[0].set_ylabel("answers right")
    for axis in rows[-1]:
        axis.set_xlabel("share of the text that is kept (pages, clusters: read by a token)")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _panel(axis: Any, cells: list[Found], styles: dict[str, dict[str, Any]]) -> None:
    """Of one length and one time of asking. styles: of each policy, in the order of their lines."""
    for number, (name, style) in enumerate(styles.items()):
        points = sorted((one["share"], one["right"], one["questions"]) for one in cells if one["policy"] == name)
        right = [good / count for _, good, count in points]
        ends = [wilson(good, count) for _, good, count in points]
        around = [[at - low for at, (low, _) in zip(right, ends)], [high - at for at, (_, high) in zip(right, ends)]]
        # beside each other, so that intervals do not lie on one another
        at = [share * 1.012 ** (number - len(styles) / 2) for share, _, _ in points]
        axis.errorbar(at, right, yerr=around, capsize=2, markersize=4, linewidth=1.1, elinewidth=0.7, label=name, **style)
    whole = [one["right"] / one["questions"] for one in cells if one["policy"] == "full"]
    if whole:
        axis.axhline(whole[0], color="black", linewidth=0.8, linestyle="--", label="everything")
    shares = sorted({one["share"] for one in cells if one["policy"] != "full"})
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
