"""`sparsify calibrate device` end to end on the CPU, with small calls and the reference kernels."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.commands import main as cli
from sparsify.commands.calibrate import device as calibrate_device
from sparsify.commands.calibrate import links as calibrate_links
from sparsify.commands.calibrate import timing
from sparsify.costs import device as hardware
from sparsify.costs.device import Device
from sparsify.costs.profile import Profile
from sparsify.costs.samples import Sample, Workload, predict
from sparsify.errors import ProfileError
from tests.support import links, processes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    hardware.forget()
    yield tmp_path / "cache"
    hardware.forget()


@pytest.fixture(scope="module")
def measured():
    """One calibration of this CPU, and by call what was measured for it."""
    real, by_call = timing.measure, {}

    def measure(cell, device, **more):
        by_call[cell] = real(cell, device, **more)
        return by_call[cell]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure", measure)
        return calibrate_device.calibrate("cpu", small=True), by_call


@pytest.fixture
def known(measured, monkeypatch):
    """Calls are not timed again."""
    monkeypatch.setattr(timing, "measure", lambda cell, device, **more: measured[1][cell])


def test_every_kind_of_call_runs_and_is_measured():
    kinds = {cell.kind for cell in calibrate_device.workloads("cpu")}
    assert kinds == {"attention", "select", "decode", "ffn", "linear", "elementwise"}
    for cell in {cell.kind: cell for cell in calibrate_device.workloads("cpu", small=True)}.values():
        assert timing.measure(cell, "cpu", replays=1).seconds > 0


def test_the_command_measures_and_the_next_description_uses_it(folder, known, capsys):
    assert cli.main(["calibrate", "device", "--device", "cpu", "--small"]) == 0
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    assert "sdpa/causal" in printed
    (path,) = folder.glob("device_*.json")
    described = hardware.describe(torch.device("cpu"))
    assert described.measured
    assert described.profile == Profile.load(path)


def test_the_fit_explains_what_was_measured(measured):
    found = measured[0]
    assert not found.failed
    device = Device.from_profile("cpu", found.profile)
    slow, quick = (
        Workload("attention", "reference", query_len=n, key_len=n, query_heads=2, kv_heads=1, head_dim=32, dtype="float32")
        for n in (512, 128)
    )
    assert predict(slow, device) > predict(quick, device) > 0
    assert found.error("reference/causal") < 1


def test_a_profile_can_be_saved_elsewhere(folder, known, tmp_path, capsys):
    assert cli.main(["calibrate", "device", "--device", "cpu", "--small", "--json", "--save", str(tmp_path / "mine.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "mine.json").read_text())
    assert Profile.load(tmp_path / "mine.json").measured
    assert not folder.exists()


def test_a_call_that_fails_is_told_and_left_out(measured, monkeypatch):
    def measure(cell, device, **more):
        if cell.kind == "select":
            raise RuntimeError("no such kernel\nand a traceback")
        return measured[1][cell]

    monkeypatch.setattr(timing, "measure", measure)
    found = calibrate_device.calibrate("cpu", small=True)
    assert len(found.failed) == sum(one.kind == "select" for one in calibrate_device.workloads("cpu", small=True)) == 12
    assert set(found.failed.values()) == {"RuntimeError: no such kernel"}
    assert "did not run" in calibrate_device.table(found)


def test_time_is_limited(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda cell, device, **more: Sample(cell, 1e-3))
    found = calibrate_device.calibrate("cpu", small=True, seconds=-1)
    assert len(found.samples) == 1
    assert "left out" in found.failed["time"]


@pytest.mark.parametrize("device, words", [("tpu", "no calibration"), ("cuda", "no CUDA")])
def test_devices_that_are_not_there(device, words):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ProfileError, match=words):
        calibrate_device.calibrate(device)


def test_without_any_result_there_is_no_profile(monkeypatch):
    def measure(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(timing, "measure", measure)
    with pytest.raises(ProfileError, match="no call could be measured"):
        calibrate_device.calibrate("cpu", small=True)


def test_random_lists_are_what_they_say():
    cell = Workload("attention", "reference", query_heads=3, kv_heads=1, query_len=1024, key_len=2048, density=0.3)
    counts, indices, density = timing.random_lists(cell, "cpu")
    assert counts.shape == (1, 3, 8)
    seen = 0
    for head in range(3):
        for row in range(8):
            blocks = indices[0, head, row, : counts[0, head, row]].tolist()
            assert blocks == sorted(set(blocks))
            assert blocks[0] == 0
            assert blocks[-1] == row + 8, "the diagonal is the last block"
            seen += len(blocks)
    assert density == pytest.approx(seen / (3 * sum(row + 9 for row in range(8))))


@pytest.mark.parametrize("cell", calibrate_device.workloads("cpu", small=True)[::3])
def test_cells_survive_a_record(cell):
    assert Workload.from_record(json.loads(json.dumps(cell.as_record()))) == cell


def test_a_record_without_a_kind_is_refused():
    with pytest.raises(ProfileError, match="no kind"):
        Workload.from_record({"key_len": 3})


@pytest.mark.slow
def test_links_are_measured_where_several_processes_are_started():
    one, other = processes.run(2, links.measured)
    assert one == other  # of the slowest
    assert one["processes"] == 2 and 0 < one["latency"] < 1
    assert min(one["exchange"], one["reduce"]) > 1e6


def test_one_process_has_no_links():
    with calibrate_links.started("cpu") as count:
        assert count == 1
