"""Facts about the device, with units: from a profile that `sparsify calibrate device` measured here, else from a shipped one."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass

import torch

from sparsify.costs import profile, profile_cache
from sparsify.costs.profile import Profile
from sparsify.errors import SparsifyError
from sparsify.graph.typed_torch import device_properties

log = logging.getLogger(__name__)

# Share of the bf16 ceiling that wider numbers reach, where no profile says better: fp32 products here are not rounded to TF32.
_WIDE = {4: 0.1, 8: 0.05}


@dataclass(frozen=True)
class Device:
    """What the cost formulas know of a device.

    type: torch's device type.
    name: for people.
    capability: compute capability, None for a CPU.
    flops: sustained FLOP/s of a bf16 matrix product.
    bandwidth: bytes/s of a copy, read plus written.
    launch: seconds of a launch.
    measured: whether the numbers were measured on such a device.
    processors: multiprocessors.
    l2_bytes: bytes of the L2 cache.
    profile: coefficients of kernel families; None: those shipped for the capability.
    source: where the numbers come from.
    memory: bytes of a GPU that is here; None for a CPU and for a device that is only described.
    """

    type: str
    name: str
    capability: tuple[int, int] | None
    flops: float
    bandwidth: float
    launch: float
    measured: bool = False
    processors: int = 132
    l2_bytes: int = 50 << 20
    profile: Profile | None = None
    source: str = ""
    memory: int | None = None

    @classmethod
    def from_profile(cls, kind: str, found: Profile) -> Device:
        """The device that a profile describes; `kind` is torch's device type."""
        numbers = {name: getattr(found, name) for name in ("capability", "flops", "bandwidth", "launch", "measured", "source")}
        return cls(kind, found.device, **numbers, processors=found.processors, l2_bytes=found.l2_bytes, profile=found)

    def describe(self) -> str:
        """The name, and what its numbers are: `NVIDIA H200 (measured: …)`."""
        return f"{self.name} ({'measured' if self.measured else 'estimate'}{': ' + self.source if self.source else ''})"

    def coefficients(self, family: str) -> dict[str, float]:
        """Coefficients of a kernel family by feature; a family that nobody measured costs what its kernel's causal one does."""
        families = (self.profile or _shipped(self.capability)).families
        kernel = family.partition("/")[0]
        for name in (family, f"{kernel}/causal", kernel, "triton/causal"):
            if name in families:
                return families[name]
        return {"call": self.launch, "work": 2.0, "bytes": 1.5}

    def knows(self, family: str) -> bool:
        return family in (self.profile or _shipped(self.capability)).families

    def matrix_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product of this dtype; a CPU's ceiling is one of fp32 already."""
        if self.type != "cuda":
            return self.flops
        return self.flops * _WIDE.get(dtype.itemsize, 1.0)


def _shipped(capability: tuple[int, int] | None) -> Profile:
    return profile.shipped("cpu") if capability is None else profile.for_capability(capability)


def describe(device: torch.device) -> Device:
    """Facts of `device`; never initialises CUDA for a CPU tensor."""
    return _describe(device.type, device.index)


@functools.cache
def _describe(kind: str, index: int | None) -> Device:
    here = profile_cache.identity(kind, index)
    try:
        found = profile_cache.load(here)
    except SparsifyError as error:
        log.warning("the measured device profile is not used: %s", error)
        found = None
    if found is None:
        found = profile_cache.default(kind, index)
    device = Device.from_profile(kind, found)
    return device if kind != "cuda" else dataclasses.replace(device, memory=device_properties(index).total_memory)


def forget() -> None:
    """Makes the next `describe` look for a measured profile again."""
    _describe.cache_clear()
