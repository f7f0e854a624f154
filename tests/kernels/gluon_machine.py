"""Runs generated Gluon text on the CPU, with stand-ins for what the text imports: threads for warps, torch for the rest.

Triton's interpreter does not know Gluon. This shows that the walk, the masks, the rings and their barriers are right and free of
deadlock. It does not show that memory is ordered on the device: copies and products are done as soon as they are asked for.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch

PATIENCE = 20.0  # seconds until a wait counts as a deadlock


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are in."""

    def __init__(self, signal: threading.Condition):
        self.signal, self.parity, self.count, self.pending, self.bytes = signal, 0, 0, 0, 0

    def settle(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.signal:
            self.pending -= arrivals
            self.bytes += expected
            if self.pending < 0:
                raise AssertionError("more arrivals than a barrier counts")
            if self.pending == 0 and self.bytes == 0:
                self.parity, self.pending = self.parity ^ 1, self.count
                self.signal.notify_all()

    def wait(self, parity: int) -> None:
        with self.signal:
            if not self.signal.wait_for(lambda: self.parity != parity, PATIENCE):
                raise TimeoutError("deadlock: a barrier was never completed")


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data):
        self.data = data

    def index(self, i):
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)])

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.data.view(shape))

    _reinterpret = reinterpret

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)


class Pointer:
    """A pointer into a flat tensor; reads outside of it are errors."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data.view(-1), offset

    def __add__(self, more):
        return Pointer(self.data, self.offset + more)


def _load(pointer, mask=None, other=None):
    offset = torch.as_tensor(pointer.offset).long()
    inside = (offset >= 0) & (offset < pointer.data.numel())
    if not bool((inside if mask is None else inside | ~mask).all()):
        raise AssertionError("a load outside of its tensor")
    found = pointer.data[torch.where(inside, offset, 0)]
    return found if mask is None else torch.where(mask, found, other)


def _store(pointer, value, mask):
    pointer.data[torch.as_tensor(pointer.offset).long()[mask]] = value[mask]


def _tile(descriptor, coordinates, shape):
    """The part of a tensor that a copy touches, and where it lies in the tile."""
    begin = [int(c) for c in coordinates]
    size = [max(0, min(n - b, s)) for n, b, s in zip(descriptor.shape, begin, shape)]
    return descriptor[tuple(slice(b, b + s) for b, s in zip(begin, size))], tuple(slice(0, s) for s in size)


def _copy_in(descriptor, coordinates, barrier, slot):
    part, where = _tile(descriptor, coordinates, slot.data.shape)
    slot.data.zero_()
    slot.data[where] = part
    barrier.settle(expected=-slot.data.numel() * slot.data.element_size())


def _copy_out(descriptor, coordinates, slot):
    part, where = _tile(descriptor, coordinates, slot.data.shape)
    part.copy_(slot.data[where])


def _assembly(text, constraints, args, dtype, is_pure, pack):
    """The two pieces of PTX that the templates have, as the reference of rows and as the product that warps of 16 rows may leave out."""
    if len(args) == 2:
        peak, top = args
        moved = (peak > top + 8).view(-1, 16, 4).any(2).any(1)[:, None, None].expand(-1, 16, 4).reshape(-1, 4)
        joined = peak.amax(1, keepdim=True).expand(-1, 4)
        return torch.where(joined > top + 8, joined, top), moved.int()
    acc, factor, moved = args
    return torch.where(moved != 0, acc * factor, acc)


def _mma(a, b, acc, use_acc=True, is_async=False):
    a, b = (x.data if isinstance(x, Shared) else x for x in (a, b))
    product = a.float() @ b.float()
    return product + acc if use_acc else product


class Launch:
    """One launch: `blocks` thread blocks at a time, each with its partitions as threads."""

    def __init__(self, blocks: int):
        self.blocks, self.local, self.errors = blocks, threading.local(), []
        self.lock = threading.Lock()

    def modules(self) -> dict:
        layout = lambda *args, **kwargs: SimpleNamespace(value=None)
        scalar = lambda x: torch.as_tensor(x, dtype=torch.int64) if isinstance(x, int) else x
        where = lambda c, a, b: torch.where(torch.as_tensor(c), scalar(a), scalar(b))
        gl = SimpleNamespace(
            constexpr=lambda x: x, bfloat16=torch.bfloat16, float16=torch.float16, 
            float32=torch.float32, int32=torch.int32, int64=torch.int64,
            NVMMASharedLayout=layout, NVMMADistributedLayout=layout, DotOperandLayout=layout, SwizzledSharedLayout=layout,
            BlockedLayout=layout, SliceLayout=layout, where=where, load=_load, store=_store, exp2=torch.exp2, log2=torch.log2,
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, to: x,
            arange=lambda a, b, layout=None: torch.arange(a, b), zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value if isinstance(value, float) else int(value), dtype=dtype),
            static_range=range, thread_barrier=lambda: None, barrier=lambda: None, 
            program_id=lambda axis: torch.tensor(self.local.block),
            num_programs=lambda axis: self.blocks, atomic_add=self.add,
            inline_asm_elementwise=_assembly, broadcast=torch.broadcast_tensors, reshape=torch.reshape,
            DistributedLinearLayout=layout,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=self.init,
            wait=lambda barrier, parity: barrier.wait(int(parity)),
            expect=lambda barrier, bytes_: barrier.settle(1, int(bytes_)),
            arrive=lambda barrier, count=1, pred=True: barrier.settle(count) if bool(pred) else None,
        )
        tma = SimpleNamespace(async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=lambda pendings: None)
        jit = lambda fn=None, **kwargs: fn if fn is not None else (lambda inner: inner)
        return {
            "gluon": SimpleNamespace(jit=jit), "gl": gl, "mbarrier": mbarrier, "tma": tma, "fence_async_shared": lambda: None,
            "warpgroup_mma": _mma, "warpgroup_mma_wait": lambda pendings, deps: deps[0],
        }  # fmt: skip

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def add(self, pointer: Pointer, value: int, sem: str) -> torch.Tensor:
        with self.lock:
            before = pointer.data[0].clone()
            pointer.data[0] += value
        return before.long()

    def allocate(self, dtype, shape, layout):
        if layout == "barrier":
            return Shared([Barrier(self.local.signal) for _ in range(shape[0])])
        return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype))

    def specialize(self, parts, warps, registers):
        self._together([(function, arguments) for function, arguments in parts], self.local.block)

    def _together(self, calls, block=None) -> None:
        def run(function, arguments, number):
            self.local.block, self.local.signal = number, threading.Condition()
            try:
                function(*arguments)
            except BaseException as error:
                self.errors.append(error)

        threads = [
            threading.Thread(target=run, args=(function, arguments, i if block is None else block), daemon=True)
            for i, (function, arguments) in enumerate(calls)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * PATIENCE)

    def run(self, text: str, arguments: list) -> None:
        """Executes the kernel `attention` of `text`. Integers and tensors are passed as the kernel would see them."""
        names = self.modules()
        lines = [line for line in text.splitlines() if not line.startswith("from triton")]
        exec(compile("\n".join(lines), "generated", "exec"), names)
        self._together([(names["attention"], arguments)] * self.blocks)
        if self.errors:
            raise self.errors[0]
