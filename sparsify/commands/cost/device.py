"""The device that a forecast is about: the one in hand, a measured profile, or a common GPU by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sparsify import pipeline
from sparsify.costs import device as hardware
from sparsify.costs import profile
from sparsify.costs.device import Device
from sparsify.errors import ConfigError, UnsupportedError, nearest
from sparsify.planning.config.config import Config
from sparsify.planning.method import Context

# Compute capability, and what differs from the shipped profile that lies nearest: about 70 % of the matrix ceiling and 80 to 90 % of the
# bandwidth in the vendor's datasheet. Kernel efficiencies stay those of the shipped profile.
_KNOWN: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "h200": ((9, 0), {}),
    "h100": ((9, 0), {"device": "NVIDIA H100 SXM", "flops": 680e12, "bandwidth": 3.0e12, "processors": 132, "l2_bytes": 50 << 20}),
    "b200": ((10, 0), {"device": "NVIDIA B200", "flops": 1500e12, "bandwidth": 6.5e12, "processors": 148, "l2_bytes": 126 << 20}),
    "a100": ((8, 0), {"device": "NVIDIA A100 SXM 80GB", "flops": 220e12, "bandwidth": 1.6e12, "processors": 108, "l2_bytes": 40 << 20}),
    "l40s": ((8, 9), {"device": "NVIDIA L40S", "flops": 210e12, "bandwidth": 0.75e12, "processors": 142, "l2_bytes": 96 << 20}),
    "rtx4090": ((8, 9), {"device": "NVIDIA RTX 4090", "flops": 150e12, "bandwidth": 0.9e12, "processors": 128, "l2_bytes": 72 << 20}),
}
NAMES = tuple(_KNOWN)
# memory of one, bytes, by the datasheets
_MEMORY = {"h200": 141e9, "h100": 80e9, "b200": 180e9, "a100": 80e9, "l40s": 48e9, "rtx4090": 24e9}


def memory(name: str | None, device: Device) -> float:
    """Bytes of a device that `named` gives for a name; infinite where nothing is known of it."""
    return device.memory or _MEMORY.get((name or "").lower(), float("inf"))


def named(name: str | None) -> Device:
    """The device called so: None for the GPU in hand, one of `NAMES`, a profile file (`.json`), or torch's word for a device.

    Raises:
        UnsupportedError: no name is given, and there is no GPU. ConfigError: the name is unknown. ProfileError: the file is no profile.
    """
    if name is None:
        if not torch.cuda.is_available():
            hint = f"name one: {', '.join(NAMES)}, cpu for this machine's, or a profile file"
            raise UnsupportedError("there is no GPU here", where="--device", hint=hint)
        return hardware.describe(torch.device("cuda"))
    if name.lower() in _KNOWN:
        capability, facts = _KNOWN[name.lower()]
        found = profile.for_capability(capability, **facts)
        if facts:
            found = found.model_copy(update={"measured": False, "source": "the vendor's datasheet"})
        return Device.from_profile("cuda", found)
    if name.endswith(".json"):
        found = profile.Profile.load(name)
        return Device.from_profile("cpu" if found.capability is None else "cuda", found)
    if name.partition(":")[0] in ("cuda", "cpu"):
        try:
            return hardware.describe(torch.device(name))
        except (RuntimeError, AssertionError) as error:
            raise UnsupportedError(f"cannot use it: {str(error).splitlines()[0]}", where=f"--device {name}") from error
    raise ConfigError("there is no such device", where=f"--device {name}", hint=nearest(name.lower(), NAMES))


def context(device: Device, config: Config) -> Context:
    """What proposals may depend on when the device is not in hand: Triton kernels on every GPU that they support."""
    here = pipeline.make_context(torch.device("cpu"), config.model_copy(update={"kernels": "auto"}))
    if device.type == "cpu" and config.kernels != "reference":
        kernels, family = here.kernels, here.family
    elif device.type != "cuda" or (device.capability or (0, 0)) < (8, 0) or config.kernels == "reference":
        kernels = family = "reference"
    else:
        kernels, family = "triton", "hopper" if device.capability == (9, 0) else "triton"
    return dataclasses.replace(here, device=device, kernels=kernels, family=family)
