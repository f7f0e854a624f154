"""A control for racecheck: one warp hands numbers to a warpgroup through a slot of shared memory, in order by construction.

Every read comes before a barrier of the whole warpgroup, that barrier before the arrival, the arrival before the next write. What the
tool reports here is no fault of a kernel but the end of what it can follow.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

_ROUNDS = 64


@gluon.jit
def _write(slot, full, empty, rounds):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(rounds):
        mbarrier.wait(empty.index(0), (i & 1) ^ 1)
        slot.store(gl.full([1], i, gl.int32, one))
        gl.thread_barrier()
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _add(slot, full, empty, rounds, out):
    four: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = 0
    for i in range(rounds):
        mbarrier.wait(full.index(0), i & 1)
        total += gl.max(slot.load(four), 0)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(0), count=1)
    gl.store(out, total)


@gluon.jit
def hand_over(out, rounds):
    slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    gl.warp_specialize([(_add, (slot, full, empty, rounds, out)), (_write, (slot, full, empty, rounds))], [1], [24])


def run() -> None:
    """Hands over 0, 1, … and checks their sum."""
    out = torch.zeros(1, device="cuda", dtype=torch.int32)
    hand_over[(1,)](out, _ROUNDS, num_warps=4)
    if out.item() != _ROUNDS * (_ROUNDS - 1) // 2:
        raise RuntimeError(f"the hand-over lost numbers: {out.item()}")
