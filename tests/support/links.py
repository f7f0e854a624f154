"""Links as the processes of the default group measure them."""

from __future__ import annotations

from typing import Any

from sparsify.commands.calibrate import device, links


def measured() -> dict[str, Any]:
    """What is measured, and what a calibration with it says."""
    found = links.measure("cpu", small=True)
    calibrated = device.calibrate("cpu", small=True, seconds=0.0, links=found)
    assert calibrated.profile.links == found and f"among {found.processes} processes" in device.table(calibrated)
    return found.model_dump()
