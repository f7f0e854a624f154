"""What travels between processes that share a model or a prompt, in bytes and in seconds.

Tensor parallelism divides heads and weights: two all-reduces of the stream a layer. Context parallelism divides a prompt of n tokens among
P processes, of which each sends in a layer at most

    dense         (P - 1) · n/P keys and values, around a ring
    sink_window   the sinks and what lies in a window of another process's rows
    xattention    (P - 1) · n/P cells of the estimate, and as many keys and values where every block is visited by some row
    minference    a few rows' queries and LSE, three numbers a block, and as many keys and values

and then, a token, each process's output and LSE. Seconds are those of bytes at the link's rate, of what is not hidden behind computations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsify.costs.device import Device
from sparsify.costs.profile import Links
from sparsify.costs.sizes import AttentionSizes
from sparsify.distributed import peers
from sparsify.ops.estimate import Estimate

Travelling = Literal["keys", "queries"]

# What a byte that travels back costs beside its way: parts of an output are merged in fp32, which reads and writes each about ten times as
# many bytes in a device's memory, ten times as fast as between two of them.
_MERGING = 1.5

# So many groups of KV heads at most are exchanged one after the other, each while another is attended: each has launches and collectives of
# its own.
MOST_GROUPS = 4

# A sum whose parts are read from peers, by every process those of all others: seconds of the smallest, two rounds of flags over NVLink and
# a launch; bytes/s at which a process reads: both measured on two H200 (benchmarks/results/mesh.jsonl, part `sums`); the most bytes of a
# part.
_PEER_LATENCY, _PEER_RATE, _MOST_PEER_BYTES = 8.2e-6, 105e9, 1 << 20

# Links of a device whose profile has none: PCIe 4.0 with 16 lanes.
_DEFAULT = Links(exchange=20e9, reduce=15e9, latency=30e-6, source="estimate: PCIe 4.0")


@dataclass(frozen=True)
class Sharing:
    """How processes share a model: `tp` share its heads and weights, `cp` groups of them its prompts."""

    tp: int = 1
    cp: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.cp

    def __str__(self) -> str:
        parts = [f"{name} {count}" for name, count in (("TP", self.tp), ("CP", self.cp)) if count > 1]
        return " × ".join(parts) or "one GPU"


ALONE = Sharing()


def ways(gpus: int, kv_heads: int) -> list[Sharing]:
    """How so many GPUs can share a model whose KV heads divide evenly."""
    return [Sharing(tp, gpus // tp) for tp in range(gpus, 0, -1) if gpus % tp == 0 and kv_heads % tp == 0]


def of(device: Device) -> Links:
    """The links of a device, measured or not."""
    found = None if device.profile is None else device.profile.links
    return found or _DEFAULT


def query_bytes(qk_head_dim: int, v_head_dim: int, item_bytes: int) -> int:
    """Bytes of a query that visits another process's keys: itself there, its output and its LSE back."""
    return (qk_head_dim + v_head_dim) * item_bytes + 4


def travelling(key_bytes: float, queries_bytes: float) -> Travelling:
    """What travels, "keys" or "queries", where blocks of keys and values or rows of queries would be so many bytes of all processes."""
    return "queries" if queries_bytes * _MERGING < key_bytes else "keys"


def key_value_bytes(sizes: AttentionSizes, processes: int) -> int:
    """The most keys and values that a process sends in a layer: its own to each of the others.

    sizes: of all the prompt's tokens and of one process's heads.
    """
    dims = int(sizes.qk_head_dim) + int(sizes.v_head_dim)
    return int(sizes.batch * sizes.kv_heads * sizes.key_len) * dims * sizes.dtype.itemsize * (processes - 1) // processes


def window_bytes(sizes: AttentionSizes, processes: int, band: int) -> int:
    """The same under a window of so many keys, sinks included: what reaches over the ends of a process's two chunks."""
    dims = int(sizes.qk_head_dim) + int(sizes.v_head_dim)
    most = key_value_bytes(sizes, processes)
    return min(most, 2 * band * int(sizes.batch * sizes.kv_heads) * dims * sizes.dtype.itemsize)


def exact_bytes(sizes: AttentionSizes, processes: int) -> int:
    """What exact attention sends: under a window of the site's own what reaches over its ends, else everything."""
    return window_bytes(sizes, processes, sizes.window) if sizes.window else key_value_bytes(sizes, processes)


def cell_bytes(sizes: AttentionSizes, processes: int, estimate: Estimate, stride: int, block: int) -> int:
    """The estimate's cells that a process sends in a layer."""
    tokens = int(sizes.batch * sizes.kv_heads * sizes.key_len) * (processes - 1) // processes
    numbers = tokens * int(sizes.qk_head_dim) // estimate.merge
    if not estimate.int8:
        return numbers * sizes.dtype.itemsize
    return numbers + 4 * tokens // (block if estimate.peak else stride)


def exchange_seconds(size: float, device: Device) -> float:
    """Of `size` bytes that a process sends to others while it receives as many."""
    links = of(device)
    return links.latency + size / links.exchange


def reduce_seconds(size: float, processes: int, device: Device) -> float:
    """Of an all-reduce over `size` bytes, after which each process has the sum."""
    links = of(device)
    return 0.0 if processes == 1 else links.latency + size * 2 * (processes - 1) / processes / links.reduce


def step_sum_seconds(size: float, processes: int, device: Device) -> float:
    """Of a token's sum over `size` bytes, which is read from peers where that is faster."""
    reduced = reduce_seconds(size, processes, device)
    if processes not in peers.PROCESSES or size > peer_bytes(processes, device):
        return reduced
    return _PEER_LATENCY + size * (processes - 1) / min(_PEER_RATE, of(device).exchange)


def peer_bytes(processes: int, device: Device) -> int:
    """Bytes of a part up to which a sum is expected to be faster read from peers than by an all-reduce; 0: of none."""
    links = of(device)
    gained = links.latency - _PEER_LATENCY
    each = (processes - 1) / min(_PEER_RATE, links.exchange) - 2 * (processes - 1) / processes / links.reduce  # that a byte more takes
    if gained <= 0:
        return 0
    return _MOST_PEER_BYTES if gained >= each * _MOST_PEER_BYTES else int(gained / each)


def exposed_seconds(cells: float, blocks: float, attention: float, kv_heads: int, device: Device) -> float:
    """What is waited for of the exchange of a divided layer, seconds.

    Args:
        cells, blocks: bytes that a process sends; no cells: a ring.
        attention: seconds of selection and attention of one process.
        kv_heads: of one process. Groups of them take turns, and the first one's exchange is waited for.
    """
    groups = min(MOST_GROUPS, kv_heads)
    whole = exchange_seconds(cells, device) * bool(cells) + exchange_seconds(blocks, device) * bool(blocks)
    if not cells:  # a ring: each part but the last is attended while another travels
        return max(0.0, whole - attention / 2)
    hidden = attention * (groups - 1) / groups
    return max(whole / groups, whole - hidden)


def shown(size: float) -> str:
    """Bytes for people."""
    unit = max(0, min(3, int(math.log(max(size, 1), 1000))))
    return f"{size / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB')[unit]}"
