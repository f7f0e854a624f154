"""Which prompts of a batch lie in one row: rows of about equal length, as few and as full as can be."""

from __future__ import annotations

import functools
from collections.abc import Sequence

# longer rows than the longest prompt that are tried, as shares of it
_STEPS = 16


@functools.lru_cache(maxsize=256)
def pack(lengths: tuple[int, ...], tokens_per_length: float) -> tuple[tuple[int, ...], ...]:
    """Numbers of the prompts in each row, so that all rows together cost least.

    First-fit decreasing (Johnson et al. 1974) into rows of several lengths between one and two times the longest prompt: a little more
    room than the longest prompt needs often fills all rows. A cost is that of a row's matrix products, which grow with its length L, and
    of its attention, which grows with L² where nothing is skipped: L + L² / tokens_per_length.

    Args:
        lengths: of the prompts, in tokens; a prompt of none lies in no row.
        tokens_per_length: the row length at which attention costs as much as the products.
    """
    longest, total = max(lengths, default=0), sum(lengths)
    if not longest:
        return ()
    rooms = {longest + longest * step // _STEPS for step in range(_STEPS + 1)}
    rooms |= {
        room
        for rows in range(total // (2 * longest), total // longest + 1)
        if rows and longest <= (room := -(-total // rows)) <= 2 * longest
    }
    best, least = (), float("inf")
    for room in sorted(rooms):
        rows = _first_fit(lengths, room)
        length = max(sum(lengths[one] for one in row) for row in rows)
        cost = len(rows) * (length + length**2 / tokens_per_length)
        if cost < least:
            best, least = rows, cost
    return best


def _first_fit(lengths: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Each prompt, the longest first, into the first row with room for it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if not lengths[number]:
            continue
        place = next((row for row, left in enumerate(free) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(room)
        rows[place].append(number)
        free[place] -= lengths[number]
    return tuple(map(tuple, rows))
