"""Tensors that go to a file and come from one in parts, beside the safetensors package."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

from sparsify.generation.caches import tensor_files
from sparsify.generation.caches.tensor_files import TensorFile

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])


def some(device="cpu"):
    """Tensors of several dtypes, and views that are not contiguous."""
    torch.manual_seed(0)
    room = torch.randn(2, 3, 40, 7, device=device)
    return {
        "view": room[:, :, :25],
        "half": torch.randn(5, 9, device=device).bfloat16(),
        "odd": torch.randint(0, 255, (7,), dtype=torch.uint8, device=device),
        "number": torch.tensor(2**40, device=device),
        "turned": torch.arange(12, dtype=torch.int32, device=device).view(3, 4).T,
        "nothing": torch.zeros(2, 0, device=device),
        "codes": torch.randn(3, device=device).to(torch.float8_e4m3fn),
    }


@pytest.fixture(params=["whole", "in parts", "staged"])
def way(request, monkeypatch):
    """How tensors move; staged: through memory of its own, as from a GPU and to one."""
    if request.param != "whole":
        monkeypatch.setattr(tensor_files, "_PART_BYTES", 24)
    if request.param == "staged":
        monkeypatch.setattr(tensor_files, "_stage", lambda device, size: tensor_files._Stage(torch.empty(size, dtype=torch.uint8), None))


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.cpu().float(), other.cpu().float())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_package_reads_what_is_written(tmp_path, device):
    given = some(device)
    tensor_files.write(tmp_path / "ours", given, {"a": "b"})
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"a": "b"}
    found = load_file(tmp_path / "ours")
    assert found.keys() == given.keys() and all(same(found[name], given[name]) for name in given)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_the_package_writes_is_read_into_views(tmp_path, device):
    given = some()
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "theirs", {"a": "b"})
    file = TensorFile.open(tmp_path / "theirs")
    assert file.metadata == {"a": "b"} and file.tensor("number") == 2**40
    room = {name: torch.zeros(*t.shape[:2], 50, *t.shape[3:], dtype=t.dtype, device=device) for name, t in given.items() if t.dim() > 2}
    to = {name: torch.zeros_like(t, device=device, memory_format=torch.preserve_format) for name, t in given.items()}
    to["view"] = room["view"][:, :, :25]
    assert not to["view"].is_contiguous() and not to["turned"].is_contiguous()
    file.read(to.items())
    assert all(same(to[name], given[name]) for name in given)
    assert not room["view"][:, :, 25:].any()


def test_a_cache_of_inference_mode_is_filled_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_stage", lambda device, size: tensor_files._Stage(torch.empty(size, dtype=torch.uint8), None))
    given = {"x": torch.arange(9)}
    tensor_files.write(tmp_path / "file", given, {})
    with torch.inference_mode():
        to = torch.zeros(9, dtype=torch.int64)
        TensorFile.open(tmp_path / "file").read([("x", to)])
    assert torch.equal(to, given["x"])


def test_what_does_not_fit_is_refused(tmp_path):
    tensor_files.write(tmp_path / "file", some(), {})
    file = TensorFile.open(tmp_path / "file")
    for name, to, message in (
        ("none", torch.zeros(1), "does not contain tensor none"),
        ("half", torch.zeros(5, 9), "half is torch.bfloat16"),
        ("odd", torch.zeros(8, dtype=torch.uint8), r"odd is torch.uint8 \(7,\)"),
    ):
        with pytest.raises(SafetensorError, match=message):
            file.read([(name, to)])
    os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size - 1)
    with pytest.raises(SafetensorError):
        TensorFile.open(tmp_path / "file")
    with pytest.raises(OSError, match="the file ends"):
        file.read([("odd", torch.zeros(7, dtype=torch.uint8))])


def test_a_file_that_takes_the_place_of_another_is_not_mixed_with_it(tmp_path, monkeypatch):
    """Between the header and the tensors, and while the package checks the header."""
    for name, number in (("old", 1), ("new", 2), ("newest", 3)):
        tensor_files.write(tmp_path / name, {"x": torch.full((9,), number)}, {})
    file = TensorFile.open(tmp_path / "old")
    (tmp_path / "new").replace(tmp_path / "old")
    assert torch.equal(file.tensor("x"), torch.full((9,), 1))
    opened = []

    def replaces(path, framework, open_it=tensor_files.safe_open):
        opened.append(path)
        if len(opened) == 1:
            (tmp_path / "newest").replace(tmp_path / "old")
        return open_it(path, framework)

    monkeypatch.setattr(tensor_files, "safe_open", replaces)
    assert torch.equal(TensorFile.open(tmp_path / "old").tensor("x"), torch.full((9,), 3)) and len(opened) == 2


def test_a_failed_write_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        tensor_files.write(tmp_path / "file", some(), {})
