"""Profiles that were measured on this machine, in the cache folder, one JSON file for each device, driver and set of versions."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify import folders, releases
from sparsify.costs import profile
from sparsify.costs.profile import Profile
from sparsify.errors import CacheFolderError, ProfileError
from sparsify.graph.typed_torch import device_properties

# of the memory's own rate, what a copy reaches: 4.13 of 4.8 TB/s on an H200
_REACHED = 0.86

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What a measurement holds for: another driver or release may be faster or slower."""

    device: str
    capability: tuple[int, int] | None
    driver: str
    torch: str
    triton: str
    sparsify: str

    @property
    def versions(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("driver", "torch", "triton", "sparsify")}


def identity(kind: str = "cuda", index: int | None = None) -> Identity:
    """The device of torch's type `kind`, as it is now; CUDA is not touched for a CPU."""
    found = {"torch": "torch", "triton": "triton", "sparsify": releases.DISTRIBUTION}
    versions = {name: str(releases.installed(distribution) or "none") for name, distribution in found.items()}
    if kind != "cuda":
        return Identity(_cpu_name() if kind == "cpu" else kind, None, "none", **versions)
    return Identity(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), _driver(), **versions)


def _cpu_name() -> str:
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _driver() -> str:
    """The driver's release where the kernel module tells it, else the CUDA release it supports; no subprocess, and nothing is imported."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    except OSError:
        pass
    try:
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        return "unknown"


def profile_path(one: Identity) -> Path:
    """Where the profile of a device lies, whether or not it is there."""
    text = json.dumps([one.device, one.capability, one.versions], sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9]+", "_", one.device).strip("_").lower()[:40]
    return folders.cache_folder() / f"device_{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load(one: Identity) -> Profile | None:
    """The profile measured on this very device, driver and versions; None where there is none.

    Raises:
        CacheFolderError: the folder is not safe to read from, or the file belongs to someone else.
        ProfileError: the file is not a profile, or one of another device.
    """
    path = profile_path(one)
    try:
        folders.check(path.parent)
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if path.is_symlink() or found.st_uid != os.geteuid():
        raise CacheFolderError("the device profile is a link or belongs to another user", where=str(path), hint="delete it")
    measured = Profile.load(path)
    if (measured.device, measured.capability, measured.versions) != (one.device, one.capability, one.versions):
        raise ProfileError("the profile is of another device or version", where=str(path), hint="delete it")
    return measured


def store(measured: Profile, one: Identity) -> Path:
    """Writes a profile atomically, for this user alone, and returns its path.

    Raises:
        CacheFolderError: the folder is not safe, or cannot be written.
    """
    path = profile_path(one)
    try:
        folders.secure(path.parent)
        folders.write(measured.to_json(), path)
    except OSError as error:
        hint = "set SPARSIFY_CACHE_DIR to a folder that you can write"
        raise CacheFolderError(f"the device profile cannot be written: {error.strerror}", where=str(path), hint=hint) from error
    return path


def default(kind: str, index: int | None = None) -> Profile:
    """The shipped profile for a device that was not measured here."""
    if kind != "cuda":
        return profile.shipped("cpu").model_copy(update={"device": kind})
    properties = device_properties(index)
    facts: dict[str, Any] = {"device": properties.name, "processors": properties.multi_processor_count}
    # in kHz and bits, of releases of torch that tell them; two transfers a clock
    clock, width = (getattr(properties, name, 0) or 0 for name in ("memory_clock_rate", "memory_bus_width"))
    if clock and width:
        facts["bandwidth"] = 2e3 * clock * width / 8 * _REACHED
    if getattr(properties, "L2_cache_size", 0):
        facts["l2_bytes"] = properties.L2_cache_size
    return profile.for_capability((properties.major, properties.minor), **facts)
