"""Device profiles: validation, defaults by capability, and the cache of measured ones with everything that must not be read from it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from sparsify import folders
from sparsify.costs import device as hardware
from sparsify.costs import profile, profile_cache
from sparsify.costs.device import Device
from sparsify.costs.profile import Profile
from sparsify.errors import CacheFolderError, ProfileError

H200 = profile.shipped("sm_90")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(path))
    hardware.forget()
    yield path
    hardware.forget()


def measured() -> tuple[Profile, profile_cache.Identity]:
    here = profile_cache.identity("cpu")
    facts = {"device": here.device, "versions": here.versions, "measured": True, "flops": 123e9}
    return profile.shipped("cpu").model_copy(update=facts), here


def test_what_ships_is_valid_and_says_where_it_is_from():
    assert H200.measured == ("by hand" not in H200.source)
    assert "benchmarks" in H200.source
    assert not profile.shipped("cpu").measured
    assert {"sdpa/causal", "hopper/lists", "select", "cache/decode", "ffn/skip", "linear", "stream"} <= set(H200.families)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (15, 1)])
def test_every_capability_has_a_profile(capability):
    found = profile.for_capability(capability, device="some GPU")
    assert not found.measured, "nobody measured it"
    assert found.device == "some GPU"
    assert ("hopper/causal" in found.families) == (capability == (9, 0))
    Profile.from_json(found.to_json())


def test_only_the_measured_device_counts_as_measured():
    assert profile.for_capability((9, 0), device=H200.device) == H200
    other = profile.for_capability((9, 0), device="NVIDIA H100 80GB HBM3")
    assert not other.measured
    assert "estimate" in Device.from_profile("cuda", other).describe()


def test_json_round_trip():
    assert Profile.from_json(H200.to_json()) == H200


@pytest.mark.parametrize(
    "change, words",
    [
        ({"flops": 0}, "flops"),
        ({"flops": "fast"}, "flops"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"families": {"sdpa/causal": {"speed": 1.0}}}, "no feature"),
        ({"families": {"sdpa/causal": {"work": -1.0}}}, "below 0"),
        ({"families": {"sdpa/causal": {}}}, "nothing"),
        ({"capability": [9]}, "capability"),
    ],
)
def test_what_is_no_profile_is_refused(change, words):
    with pytest.raises(ProfileError, match=words):
        Profile.from_json(json.dumps(json.loads(H200.to_json()) | change))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"flops": NaN}'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ProfileError, match="not a device profile"):
        Profile.from_json(text)


def test_a_measured_profile_is_used_from_then_on(folder):
    cpu = torch.device("cpu")
    assert not hardware.describe(cpu).measured
    found, here = measured()
    path = profile_cache.store(found, here)
    assert (path.parent, path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (folder, 0o600, 0o700)
    hardware.forget()
    described = hardware.describe(cpu)
    assert described.measured
    assert described.flops == 123e9


def test_another_driver_or_release_does_not_count(folder):
    found, here = measured()
    profile_cache.store(found, here)
    for change in ({"driver": "999.1"}, {"torch": "9.9"}, {"triton": "9.9"}, {"sparsify": "9.9"}, {"device": "other"}):
        other = profile_cache.Identity(**{**vars(here), **change})
        assert profile_cache.load(other) is None


def test_a_renamed_profile_of_another_device_is_refused(folder):
    found, here = measured()
    path = profile_cache.store(found, here)
    other = profile_cache.Identity(**{**vars(here), "driver": "999.1"})
    path.rename(profile_cache.profile_path(other))
    with pytest.raises(ProfileError, match="another device or version"):
        profile_cache.load(other)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', "\x00" * 64])
def test_a_corrupt_file_is_refused_and_the_default_serves(folder, text, caplog):
    found, here = measured()
    path = profile_cache.store(found, here)
    path.write_text(text)
    with pytest.raises(ProfileError):
        profile_cache.load(here)
    hardware.forget()
    assert not hardware.describe(torch.device("cpu")).measured
    assert "is not used" in caplog.text


def test_nothing_is_read_from_a_folder_that_others_can_write(folder):
    found, here = measured()
    profile_cache.store(found, here)
    folder.chmod(0o777)
    with pytest.raises(CacheFolderError, match="others can write"):
        profile_cache.load(here)
    with pytest.raises(CacheFolderError):
        profile_cache.store(found, here)


def test_nothing_is_read_through_a_link(folder, tmp_path):
    found, here = measured()
    path = profile_cache.store(found, here)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CacheFolderError, match="link"):
        profile_cache.load(here)


def test_a_foreign_owner_is_refused(folder, monkeypatch):
    found, here = measured()
    profile_cache.store(found, here)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(CacheFolderError, match="another user"):
        profile_cache.load(here)


def test_a_disk_that_is_full_leaves_the_old_profile(folder, monkeypatch):
    found, here = measured()
    path = profile_cache.store(found, here)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.Path, "replace", full)
    with pytest.raises(CacheFolderError, match="No space"):
        profile_cache.store(found.model_copy(update={"flops": 1e9}), here)
    monkeypatch.undo()
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "found, bandwidth",
    [
        ({"name": "NVIDIA H100 PCIe", "memory_clock_rate": 1593000, "memory_bus_width": 5120}, 2.04e12 * 0.86),
        ({"name": "NVIDIA H100 PCIe"}, H200.bandwidth),
        ({"name": H200.device, "memory_clock_rate": 1, "memory_bus_width": 1}, H200.bandwidth),
    ],
)
def test_an_unmeasured_gpu_tells_what_it_can(monkeypatch, found, bandwidth):
    properties = type("Properties", (), {"major": 9, "minor": 0, "multi_processor_count": 114, "L2_cache_size": 50 << 20, **found})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    default = profile_cache.default("cuda")
    assert default.bandwidth == pytest.approx(bandwidth, rel=0.01)
    same = found["name"] == H200.device
    assert default.measured == (same and H200.measured)
    assert default.processors == (H200.processors if same else 114)
