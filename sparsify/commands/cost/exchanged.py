"""What GPUs that share a model send each other in a forecast, and what is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.costs import links
from sparsify.costs.device import Device
from sparsify.costs.links import Sharing
from sparsify.costs.sizes import AttentionSizes
from sparsify.ops.estimate import Estimate

_SUMS = 2  # all-reduces of a layer that tensor parallelism divides: behind attention, and behind the feed-forward block


@dataclass(frozen=True)
class Attended:
    """One attention of a call, of all heads and of the whole prompt.

    sizes: of it.
    method: what serves it, with `options`.
    seconds: of one GPU's share.
    """

    sizes: AttentionSizes
    method: str
    options: dict[str, Any]
    seconds: float

    def bytes(self, sharing: Sharing) -> tuple[int, int]:
        """The estimate's cells, and keys and values, that a GPU sends at most."""
        if sharing.cp == 1:
            return 0, 0
        cells, kept = 0, links.key_value_bytes(self.sizes, sharing.cp)
        if self.method == "xattention":
            estimate = Estimate.from_names(self.options["estimate"])
            cells = links.cell_bytes(self.sizes, sharing.cp, estimate, self.options["stride"], self.options["block"])
        band = self.sizes.window or 0
        if self.method == "sink_window":
            windows = self.options["window"]
            every = windows if isinstance(windows, Sequence) else (windows,)
            band = self.options["sinks"] + max(every) if all(every) else 0
        if band:
            kept = links.window_bytes(self.sizes, sharing.cp, band)
        return cells // sharing.tp, kept // sharing.tp


def sent(attended: Iterable[Attended], sharing: Sharing, stream_bytes: int) -> dict[str, int]:
    """Bytes that a GPU sends at most for a prompt, by what they are.

    Args:
        stream_bytes: of the prompt's residual stream.
    """
    cells = kept = layers = 0
    for one in attended:
        more, keys = one.bytes(sharing)
        cells, kept, layers = cells + more, kept + keys, layers + 1
    sums = _SUMS * layers * stream_bytes // sharing.cp * 2 * (sharing.tp - 1) // sharing.tp
    found = {"keys and values": kept, "the estimate's cells": cells, "sums": sums}
    return {what: size for what, size in found.items() if size}


def seconds(attended: Iterable[Attended], sharing: Sharing, stream_bytes: int, layers: int, device: Device, *, step: bool) -> float:
    """What a call waits for the others.

    Args:
        stream_bytes: of the residual stream of one GPU's tokens.
        layers: of the model.
        step: whether it is one token after the prompt, whose attention each process does over its own keys.
    """
    if sharing.size == 1:
        return 0.0
    reduce = links.step_sum_seconds if step else links.reduce_seconds
    total = _SUMS * layers * reduce(stream_bytes, sharing.tp, device)
    if step:
        # outputs and LSE of a token are a few kB: the latency
        return total + layers * links.of(device).latency * (sharing.cp > 1)
    for one in attended:
        cells, kept = one.bytes(sharing)
        total += links.exposed_seconds(cells, kept, one.seconds, max(1, int(one.sizes.kv_heads) // sharing.tp), device)
    return total


def scratch(attended: Iterable[Attended], sharing: Sharing) -> int:
    """Bytes of other GPUs' keys and values that one holds at a time: those of the layer that takes most."""
    if sharing.cp == 1:
        return 0
    found = 0
    for one in attended:
        own = links.key_value_bytes(one.sizes, sharing.cp) // (sharing.cp - 1) // sharing.tp
        groups = min(links.MOST_GROUPS, max(1, int(one.sizes.kv_heads) // sharing.tp))
        # a ring holds what came and what comes; two groups of heads hold the whole prompt
        found = max(found, 2 * own if one.method == "dense" else min(1.0, 2 / groups) * own * sharing.cp)
    return int(found)


def notes(device: Device) -> list[str]:
    """In words, what the numbers of several GPUs rest on."""
    found = links.of(device)
    kind = f"measured among {found.processes}" if found.processes else "estimates"
    rates = f"{found.exchange / 1e9:.0f} GB/s of an exchange, {found.reduce / 1e9:.0f} GB/s of a sum, {found.latency * 1e6:.0f} µs each"
    return [
        f"links: {rates}, {kind}{' (' + found.source + ')' if found.source else ''}",
        "what travels is counted as if every block were visited by some row; times and memory are those of one GPU",
    ]
