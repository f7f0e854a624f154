"""Facts about the device, with units. Ceilings are estimates by compute capability until they are measured on the machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Sustained ceilings by compute capability: (bf16 matrix FLOP/s, memory bytes/s). 9.0 was measured on an H200 (8192-cubed matrix
# product, device-to-device copy); the others are about 70 % of the vendors' datasheets.
_CEILINGS = {
    (8, 0): (220e12, 1.6e12),
    (8, 6): (100e12, 0.7e12),
    (8, 9): (210e12, 0.8e12),
    (9, 0): (680e12, 4.3e12),
    (10, 0): (1500e12, 6.5e12),
    (12, 0): (280e12, 1.4e12),
}


@dataclass(frozen=True)
class Device:
    """What the cost formulas know of a device.

    flops: sustained FLOP/s of a bf16 matrix product. bandwidth: bytes/s of a copy, read plus written. launch: seconds of a launch.
    """

    type: str
    name: str
    capability: tuple[int, int] | None
    flops: float
    bandwidth: float
    launch: float
    measured: bool = False


@functools.cache
def describe(device: torch.device) -> Device:
    """Facts of `device`; never initialises CUDA for a CPU tensor."""
    if device.type != "cuda":
        return Device(device.type, device.type, None, 1e11, 2e10, 1e-5)
    capability = torch.cuda.get_device_capability(device)
    known = max((c for c in _CEILINGS if c <= capability), default=(8, 0))
    flops, bandwidth = _CEILINGS[known]
    return Device("cuda", torch.cuda.get_device_name(device), capability, flops, bandwidth, 8e-6)
