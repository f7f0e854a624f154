"""What a device is known to do: ceilings, and how far each kernel family stays below them. Validated, and kept as JSON files.

A family's time is linear in a few features of a call (`sparsify.costs.work` computes them), so that one least-squares fit finds its
coefficients and a formula stays short enough to print:

    feature   is                                                                          coefficient
    call      1                                                                           seconds of a call, however small
    work      FLOPs of whole tiles / matrix ceiling, in whole waves over the processors   1 / efficiency
    scores    softmax entries / matrix ceiling                                            FLOPs that an entry costs
    masses    masses that the row rule compares with cutoffs / matrix ceiling             FLOPs that a mass costs
    work8     8-bit operations / twice the matrix ceiling                                 1 / efficiency
    bytes     bytes that must move / bandwidth                                            1 / efficiency
    scratch   bytes of scratch written and read / bandwidth                               1 / efficiency
    prepare   bytes moved by passes before the main kernel / bandwidth                    1 / efficiency
    passes    kernels over the operands before the main one                                seconds of one, however small
    steps     loads that a program waits for one after the other                          seconds of a load
    rows      row tiles / processors                                                      seconds of a tile beside its work
    tail      time that others wait for the longest tile, or for what one processor reads alone, share of that wait
              at worst
    spill     work · log2(a KV head's keys and values / half of the L2 cache), 3 at most  share of it that is added
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparsify.errors import ProfileError

FORMAT = 1
FEATURES = ("call", "work", "scores", "masses", "work8", "bytes", "scratch", "prepare", "passes", "steps", "rows", "tail", "spill")
_MOST = 1e6  # no coefficient of a real device comes near


class Links(BaseModel):
    """What processes on devices of one kind send each other.

    exchange: bytes/s that each of them sends while it receives as many.
    reduce: bytes/s of an all-reduce among P of them, of which each sends 2 (P - 1) / P of the sum's size.
    latency: seconds of the smallest of both.
    processes: among how many they were measured; 0: estimates.
    source: where the numbers come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    exchange: float = Field(gt=0)
    reduce: float = Field(gt=0)
    latency: float = Field(gt=0, lt=1)
    processes: int = Field(default=0, ge=0)
    source: str = ""


class Profile(BaseModel):
    """One device's numbers.

    format: of the file.
    device: its name, for people.
    capability: compute capability, None for a CPU.
    processors: multiprocessors.
    l2_bytes: bytes of the L2 cache.
    flops: FLOP/s of a large bf16 matrix product.
    bandwidth: bytes/s of a copy, read plus written.
    launch: seconds between launches.
    families: coefficients of the module's features by kernel family, `kernel/kind`.
    measured: whether the numbers were measured on this kind of device.
    source: where the numbers come from.
    versions: of the packages that measured them, by name.
    links: to other devices of the kind; None where nothing is known of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    device: str
    capability: tuple[int, int] | None = None
    processors: int = Field(ge=1)
    l2_bytes: int = Field(ge=1)
    flops: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    launch: float = Field(gt=0, lt=1)
    families: dict[str, dict[str, float]]
    measured: bool = False
    source: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    links: Links | None = None

    @field_validator("families")
    @classmethod
    def _coefficients(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for family, found in value.items():
            unknown = sorted(set(found) - set(FEATURES))
            if unknown:
                raise ValueError(f"{family} has a coefficient for {unknown[0]!r}, which is no feature")
            if not all(0 <= number <= _MOST for number in found.values()):
                raise ValueError(f"{family} has a coefficient below 0 or far too large")
            if not any(found.values()):
                raise ValueError(f"{family} would cost nothing")
        return value

    def __hash__(self) -> int:
        return hash((self.device, self.flops, self.bandwidth, tuple(self.families), self.links))

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Raises ProfileError for anything that is not a profile of this format."""
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as failure:
            first = failure.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            message = f"not a device profile: {key + ': ' if key else ''}{first['msg']}"
            raise ProfileError(message, where=where, hint="`sparsify calibrate device` makes a new one") from None

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise ProfileError(f"cannot read the profile: {reason}", where=str(path)) from error


# Sustained ceilings that nobody measured: (bf16 matrix FLOP/s, memory bytes/s, multiprocessors, L2 bytes) by compute capability, about 70 %
# of the vendors' datasheets. Families cost there what they cost on the nearest device that was measured.
_ESTIMATES = {
    (8, 0): (220e12, 1.6e12, 108, 40 << 20),
    (8, 6): (100e12, 0.7e12, 84, 6 << 20),
    (8, 9): (210e12, 0.8e12, 128, 72 << 20),
    (10, 0): (1500e12, 6.5e12, 148, 126 << 20),
    (12, 0): (280e12, 1.4e12, 170, 96 << 20),
}
# Links that nobody measured: bytes/s and seconds as in `Links`, about 85 % of NVLink's datasheet rates, and of PCIe's where there is none.
_LINKS = {
    (8, 0): (255e9, 230e9, 20e-6, "estimate: NVLink 3"),
    (8, 6): (20e9, 15e9, 30e-6, "estimate: PCIe 4.0"),
    (8, 9): (20e9, 15e9, 30e-6, "estimate: PCIe 4.0"),
    (10, 0): (765e9, 700e9, 20e-6, "estimate: NVLink 5"),
    (12, 0): (40e9, 30e9, 30e-6, "estimate: PCIe 5.0"),
}
_MEASURED = {(9, 0): "sm_90"}


@functools.cache
def shipped(name: str) -> Profile:
    """A profile of the package's own, measured or for the CPU: `sm_90`, `cpu`. Raises ProfileError when there is none."""
    file = resources.files("sparsify") / "costs" / "profiles" / f"{name}.json"
    try:
        return Profile.from_json(file.read_text(encoding="utf-8"), name)
    except FileNotFoundError:
        raise ProfileError("no profile is shipped for this device", where=name) from None


def for_capability(capability: tuple[int, int], **facts: Any) -> Profile:
    """The profile of the nearest compute capability that is not above.

    Args:
        facts: replace fields, such as the device's name: another device than the measured one makes the profile an estimate.
    """
    known = max((one for one in (*_MEASURED, *_ESTIMATES) if one <= capability), default=(8, 0))
    base = shipped(_MEASURED.get(known, "sm_90"))
    if known in _MEASURED:
        same = known == capability and facts.get("device", base.device) == base.device
        return base if same else base.model_copy(update={**facts, "capability": capability, "measured": False, "source": _like(base)})
    flops, bandwidth, processors, cache = _ESTIMATES[known]
    families = {name: found for name, found in base.families.items() if not name.startswith("hopper/")}
    numbers: dict[str, Any] = {"flops": flops, "bandwidth": bandwidth, "processors": processors, "l2_bytes": cache, "families": families}
    exchange, reduce, latency, source = _LINKS[known]
    numbers["links"] = Links(exchange=exchange, reduce=reduce, latency=latency, source=source)
    named = {"device": f"capability {capability[0]}.{capability[1]}", **facts}
    return base.model_copy(update={**numbers, **named, "capability": capability, "measured": False, "source": _like(base)})


def _like(base: Profile) -> str:
    return f"estimate: datasheets, efficiencies as on {base.device}"
