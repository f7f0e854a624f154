"""What travels between the processes that share a prompt, in bytes."""

from __future__ import annotations

from typing import Literal

Travelling = Literal["keys", "queries"]

# What a byte that travels back costs beside its way: parts of an output are merged in fp32, which reads and writes each about ten times as
# many bytes in a device's memory, ten times as fast as between two of them.
_MERGING = 1.5


def query_bytes(qk_head_dim: int, v_head_dim: int, item_bytes: int) -> int:
    """Bytes of a query that visits another process's keys: itself there, its output and its LSE back."""
    return (qk_head_dim + v_head_dim) * item_bytes + 4


def travelling(key_bytes: float, queries_bytes: float) -> Travelling:
    """What travels, "keys" or "queries", where blocks of keys and values or rows of queries would be so many bytes of all processes."""
    return "queries" if queries_bytes * _MERGING < key_bytes else "keys"
