"""safetensors files whose tensors go between a device and a disk in parts, several at a time: no second copy of a tensor is ever made.

The format is the published one (a length of 8 bytes, a header in JSON, then the bytes of all tensors), which any reader of it reads; the
package's own writer wants each tensor once more in the host's memory, and its reader hands them over one by one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.ops.limits import cdiv

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# of a tensor that moves at once, through pinned memory where it comes from a GPU or goes to one
_PART_BYTES = 1 << 25
# one thread copies to or from the pages of a file at a part of the bus' rate
_THREADS = 8
_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a file. begin: of its bytes, counted from the file's first one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class _Handle:
    """A file that is open for as long as somebody holds this. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def is_at(self, path: Path) -> bool:
        """Whether the path still names this file, and not another one that took its place."""
        return os.path.samestat(os.fstat(self.number), path.stat())


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a file holds, which is read as it is asked for: always of the file that was opened, whatever takes its place meanwhile."""

    path: Path
    handle: _Handle
    metadata: dict[str, str]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Reads the header.

        Raises:
            SafetensorError: not such a file, or damaged, or a dtype that torch does not have.
            OSError: the file cannot be read.
        """
        handle = _checked(path)
        size = int.from_bytes(os.pread(handle.number, _LENGTH, 0), "little")
        text = bytearray(size)
        _get(handle.number, memoryview(text), _LENGTH)
        header = json.loads(text)
        metadata, entries = header.pop("__metadata__", {}), {}
        for name, said in header.items():
            if said["dtype"] not in _DTYPES:
                raise SafetensorError(f"{name} is {said['dtype']}")
            entries[name] = Entry(_DTYPES[said["dtype"]], tuple(said["shape"]), _LENGTH + size + said["data_offsets"][0])
        return cls(path, handle, metadata, entries)

    def entry(self, name: str) -> Entry:
        """Raises SafetensorError where there is no such tensor."""
        if name not in self.entries:
            raise SafetensorError(f"the file does not contain tensor {name}")
        return self.entries[name]

    def tensor(self, name: str) -> Tensor:
        """A small tensor, on the CPU.

        Raises:
            SafetensorError: there is none.
            OSError: the file cannot be read.
        """
        entry = self.entry(name)
        found = torch.empty(entry.shape, dtype=entry.dtype)
        self.read([(name, found)])
        return found

    def read(self, wanted: Iterable[tuple[str, Tensor]]) -> None:
        """Fills tensors, which may be views of larger ones and lie on any device.

        Raises:
            SafetensorError: there is no such tensor, or it has another dtype or shape.
            OSError: the file cannot be read.
        """
        parts: list[_Part] = []
        for name, to in wanted:
            entry = self.entry(name)
            if (entry.dtype, entry.shape) != (to.dtype, tuple(to.shape)):
                raise SafetensorError(f"{name} is {entry.dtype} {entry.shape}, not {to.dtype} {tuple(to.shape)}")
            parts += _parts(to, entry.begin)
        _run(parts, lambda part, stage: _read(self.handle.number, part, stage))


def _checked(path: Path) -> _Handle:
    """A file of which the package says that its header tells of each byte whose it is, and that all are there. The package opens a path
    by itself, which may name another file by then."""
    while True:
        handle = _Handle(path)
        with safe_open(path, "pt"):
            pass
        if handle.is_at(path):
            return handle


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors, which may be views of larger ones and lie on any device. Nobody may change them meanwhile.

    Raises:
        OSError: the file cannot be written.
    """
    # the largest elements come first, so that each tensor begins at a multiple of its own
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entries[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)
    first = _LENGTH + len(header)
    parts = [part for name in order for part in _parts(tensors[name], first + entries[name]["data_offsets"][0])]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        _put(handle, len(header).to_bytes(_LENGTH, "little") + header, 0)
        os.ftruncate(handle, first + end)
        _run(parts, lambda part, stage: _write(handle, part, stage))
    finally:
        os.close(handle)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Neighbouring bytes of a tensor, uint8 [n], and where they lie in the file."""

    data: Tensor
    begin: int


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Pinned memory through which one part at a time goes, uint8 [n], and the stream that copies it."""

    held: Tensor
    stream: Any


def _parts(tensor: Tensor, begin: int) -> Iterator[_Part]:
    """A tensor's bytes in the order in which a file has them."""
    if tensor.dim() and not tensor.is_contiguous():
        for row in tensor:
            yield from _parts(row, begin)
            begin += row.numel() * row.element_size()
        return
    data = tensor.detach().reshape(-1).view(torch.uint8)
    for first in range(0, len(data), _PART_BYTES):
        yield _Part(data[first : first + _PART_BYTES], begin + first)


def _run(parts: list[_Part], work: Callable[[_Part, _Stage | None], None]) -> None:
    """Does something with every part, several at a time, each with a stage of its device."""
    stages: dict[torch.device, queue.SimpleQueue[_Stage | None]] = {}
    count = max(1, min(_THREADS, cdiv(sum(len(part.data) for part in parts), _PART_BYTES)))
    most = max((len(part.data) for part in parts), default=0)
    for device in {part.data.device for part in parts}:
        free = stages[device] = queue.SimpleQueue()
        for _ in range(count):
            free.put(_stage(device, most))

    def one(part: _Part) -> None:
        free = stages[part.data.device]
        stage = free.get()
        try:
            work(part, stage)
        finally:
            free.put(stage)

    with ThreadPoolExecutor(count) as threads:
        for _ in threads.map(one, parts):
            pass


def _stage(device: torch.device, size: int) -> _Stage | None:
    """None for parts that lie in the host's memory and go to the file as they are."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return _Stage(torch.empty(size, dtype=torch.uint8), None)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what the tensors still wait for
    return _Stage(torch.empty(size, dtype=torch.uint8, pin_memory=True), stream)


@torch.inference_mode()  # threads do not inherit the mode under which a cache was allocated
def _copied(to: Tensor, source: Tensor, stream: Any) -> None:
    """Copies, and waits for it."""
    if stream is None:
        to.copy_(source)
        return
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
    stream.synchronize()


def _write(handle: int, part: _Part, stage: _Stage | None) -> None:
    data = part.data
    if stage is not None:
        data = stage.held[: len(part.data)]
        _copied(data, part.data, stage.stream)
    _put(handle, data.numpy().data, part.begin)


def _read(handle: int, part: _Part, stage: _Stage | None) -> None:
    data = part.data if stage is None else stage.held[: len(part.data)]
    _get(handle, data.numpy().data, part.begin)
    if stage is not None:
        _copied(part.data, data, stage.stream)


def _put(handle: int, data: bytes | memoryview, begin: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], begin + done)


def _get(handle: int, to: memoryview, begin: int) -> None:
    done = 0
    while done < len(to):
        got = os.preadv(handle, [to[done:]], begin + done)
        if not got:
            raise OSError(f"the file ends at byte {begin + done}, while it is read")
        done += got


__all__ = ["Entry", "TensorFile", "write"]
