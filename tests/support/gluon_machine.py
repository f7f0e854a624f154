"""Runs generated Gluon text on the CPU, with stand-ins for what the text imports: threads for warps, torch for the rest.

Triton's interpreter does not know Gluon. This shows that the walk, the masks, the rings and their barriers are right and free of
deadlock. It does not show that memory is ordered on the device: copies and products are done as soon as they are asked for.
"""

from __future__ import annotations

import struct
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
    """Inline PTX over a warpgroup's tiles, [64, 4] or [64, eights, 4, 2] with rows and columns as wgmma leaves them to threads."""
    several = isinstance(dtype, tuple)
    shape = args[0].shape
    held = [_by_thread(arg) for arg in args]
    if any(one.shape[0] != pack for one in held):
        raise AssertionError(f"a thread holds {held[0].shape[0]} numbers, not {pack}")
    outputs = pack * (len(dtype) if several else 1)
    codes = constraints.split(",")
    operands = [torch.full((4, 32), torch.nan)] * outputs + [row for one in held for row in one]
    if len(codes) != len(operands):
        raise AssertionError(f"{len(operands)} operands, {len(codes)} constraints")
    for at, code in enumerate(codes):
        if code.isdigit():  # an input in an output's register
            operands[int(code)] = operands[at]
    _ptx(text, operands)
    found = [_from_threads(torch.stack(operands[i : i + pack]), shape) for i in range(0, outputs, pack)]
    return tuple(found) if several else found[0]


def _by_thread(tile):
    """[numbers of a thread, warps, lanes]: registers count neighbours in a row, then rows 8 apart, then eights of columns."""
    if tile.dim() == 2:
        return tile.reshape(4, 2, 8, 4).permute(1, 0, 2, 3).reshape(2, 4, 32)
    return tile.reshape(4, 2, 8, -1, 4, 2).permute(3, 1, 5, 0, 2, 4).reshape(-1, 4, 32)


def _from_threads(numbers, shape):
    if len(shape) == 2:
        return numbers.reshape(2, 4, 8, 4).permute(1, 0, 2, 3).reshape(shape)
    return numbers.reshape(-1, 2, 2, 4, 8, 4).permute(3, 1, 4, 0, 5, 2).reshape(shape)


def _ptx(text, operands):
    """Runs a block of PTX for four warps. It knows forward branches to the block's end and the instructions below."""
    registers, active = {}, torch.ones(4, 1, dtype=torch.bool)

    def value(name):
        if name.startswith("$"):
            return operands[int(name[1:])]
        if name.startswith("0f"):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return registers[name] if name in registers else torch.tensor(float(int(name, 0)))

    for statement in text.strip("{} ").split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] in (".reg", "KEEP:"):
            continue
        if words[0].startswith("@"):
            taken = value(words[0].strip("@!"))
            active = active & (taken if words[0][1] == "!" else ~taken)  # what follows runs where the branch is not taken
            if (taken != taken[:, :1]).any():
                raise AssertionError("lanes of a warp part")
            continue
        name, target, *sources = words
        mnemonic, given = name.split(".")[0], [value(source) for source in sources]
        result = _INSTRUCTIONS[mnemonic](statement, given)
        before = operands[int(target[1:])] if target.startswith("$") else registers.get(target, torch.zeros(4, 32, dtype=result.dtype))
        result = torch.where(active, result, before)
        if target.startswith("$"):
            operands[int(target[1:])] = result
        else:
            registers[target] = result


def _compared(statement, given):
    found = torch.gt(given[0], given[1]) if ".gt." in statement else torch.eq(given[0], given[1])
    return found | given[2] if ".or." in statement else found


_INSTRUCTIONS = {
    "add": lambda _, given: given[0] + given[1],
    "mul": lambda _, given: given[0] * given[1],
    "max": lambda _, given: torch.maximum(given[0], given[1]),
    "mov": lambda _, given: given[0],
    "selp": lambda _, given: torch.where(given[2], given[0], given[1]),
    "setp": _compared,
    "vote": lambda _, given: given[0].any(1, keepdim=True).expand(4, 32),
    "shfl": lambda _, given: given[0][:, torch.arange(32) ^ int(given[1])],
}


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
