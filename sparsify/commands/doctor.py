"""`sparsify doctor`: what works on this machine, what does not, and the one command or setting that would mend it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsify import folders, releases
from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DIFFERS, DONE
from sparsify.errors import CacheFolderError, SparsifyError

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "warn", "fail"]

_EXTRAS = {"triton": "triton", "transformers": "hf"}


@dataclass(frozen=True)
class Check:
    """What was found about one thing.

    name: of the thing.
    status: "ok"; "warn": it works, but slower or less than it could; "fail": something that sparsify promises does not work.
    found: in words.
    remedy: a command or a setting; empty where nothing has to be mended.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    parser = commands.add_parser(
        "doctor", parents=[arguments.common_options()], help="what works on this machine, and what would mend the rest"
    )
    parser.add_argument("--try", dest="trial", action="store_true", help="also compile a small attention and compare it with eager PyTorch")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    checks = list(examine(given))
    failed = any(check.status == "fail" for check in checks)
    if given.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
    else:
        print(table(checks))
    return DIFFERS if failed else DONE


def table(checks: list[Check]) -> str:
    """A line for each check, with its remedy below."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.found}")
        if check.remedy:
            lines.append(f"{'':4}  {'':{width}}  → {check.remedy}")
    return "\n".join(lines)


def examine(given: argparse.Namespace) -> Iterator[Check]:
    """Every check, in the order in which one depends on another."""
    yield from map(package, releases.TESTED)
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    yield from map(gpu, devices) if devices else [no_gpu()]
    yield compiler()
    yield from map(kernels, devices or [torch.device("cpu")])
    yield cache_folder()
    yield from map(profile, devices or [torch.device("cpu")])
    yield configuration(given)
    yield from map(ahead, devices[:1] or [torch.device("cpu")])
    if given.trial:
        yield from map(trial, devices[:1] or [torch.device("cpu")])


def package(name: str) -> Check:
    """Whether a package is there, and of a release that is promised."""
    version, (oldest, newest) = releases.installed(name), releases.TESTED[name]
    if version is None:
        what = {"triton": "no kernels on GPUs", "transformers": "no models by name, no caches, no generate()"}.get(name, "")
        return Check(name, "warn", f"not installed: {what}", f'pip install "{releases.DISTRIBUTION}[{_EXTRAS.get(name, "hf")}]"')
    if why := releases.obstacle(name):
        return Check(name, "fail", why, f'pip install "{name}>={oldest}"')
    if why := releases.newer(name):
        return Check(
            name, "warn", f"{why}, the newest that was tested: what is not recognised stays as it was", f'pip install "{name}=={newest}"'
        )
    return Check(name, "ok", f"{version} (tested: {oldest} to {newest})")


def gpu(device: torch.device) -> Check:
    """A GPU, and whether kernels support its compute capability."""
    import torch

    from sparsify.ops.limits import MIN_CAPABILITY

    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}"
    if torch.version.hip is not None:
        return Check(str(device), "warn", f"{found}: AMD GPUs run the reference")
    if capability < MIN_CAPABILITY:
        return Check(str(device), "warn", f"{found}: kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, the reference runs")
    return Check(str(device), "ok", found)


def no_gpu() -> Check:
    """That there is no GPU, or none that this build of torch uses."""
    import torch

    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            return Check(
                "gpu",
                "fail",
                f"an NVIDIA driver is here, but torch {torch.__version__} is built without CUDA",
                "pip install --force-reinstall torch",
            )
        return Check("gpu", "fail", f"torch is built for CUDA {torch.version.cuda}, but finds no device", "nvidia-smi")
    return Check("gpu", "warn", "none: what runs here is right, and no measure of speed")


def compiler() -> Check:
    """The C++ compiler, which Inductor needs for graphs on CPUs, and Triton for its launchers."""
    from sparsify.graph import compat

    if (why := compat.cpp_obstacle()) is None:
        return Check("c++ compiler", "ok", "found")
    remedy = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    return Check("c++ compiler", "fail", f"{why}: Inductor cannot compile for CPUs, nor Triton launch", remedy)


def kernels(device: torch.device) -> Check:
    """Which family serves each op on a device."""
    from sparsify.backends import dispatch

    family, reason = dispatch.attention_family(device)
    by_family: dict[str, list[str]] = {}
    for op, served in dispatch.first_families(device).items():
        by_family.setdefault(served, []).append(op)
    found = "; ".join(f"{served}: {', '.join(ops)}" for served, ops in by_family.items())
    if family != "reference":
        return Check(f"kernels on {device}", "ok", found)
    remedy = ""
    if device.type == "cuda" and releases.installed("triton") is None:
        remedy = f'pip install "{releases.DISTRIBUTION}[triton]"'
    return Check(f"kernels on {device}", "warn", f"the reference serves attention ({reason}): right, and slow", remedy)


def cache_folder() -> Check:
    """Whether generated code and profiles can be kept from one process to the next."""
    folder = folders.cache_folder()
    try:
        folders.secure(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except SparsifyError as error:
        return Check("cache folder", "fail", f"{error.where}: {error.what}", error.hint)
    except OSError as error:
        above = next((one for one in folder.parents if one.exists() and not one.is_dir()), None)
        why = error.strerror if above is None else f"{above} is a file"
        return Check("cache folder", "fail", f"{folder}: {why}", "export SPARSIFY_CACHE_DIR=… to a folder that you can write")
    return Check("cache folder", "ok", str(folder))


def profile(device: torch.device) -> Check:
    """Whether the cost model's numbers were measured on such a device."""
    from sparsify.costs import device as hardware
    from sparsify.costs import profile_cache

    name, remedy = f"costs on {device}", f"sparsify calibrate device --device {device.type}"
    try:
        profile_cache.load(profile_cache.identity(device.type, device.index))
    except CacheFolderError as error:  # a new measurement would not be kept either
        return Check(name, "fail", f"{error.where}: {error.what}", error.hint)
    except SparsifyError as error:
        return Check(name, "fail", str(error), remedy)
    found = hardware.describe(device)
    return Check(name, "ok", found.describe()) if found.measured else Check(name, "warn", found.describe(), remedy)


def configuration(given: argparse.Namespace) -> Check:
    """Whether the configuration in effect can be read, methods of other packages included."""
    try:
        loading.load_config(given)
    except SparsifyError as error:
        return Check("configuration", "fail", str(error), "sparsify config")
    return Check("configuration", "ok", "can be read")


def ahead(device: torch.device) -> Check:
    """Whether kernels are compiled beside the model's compilation."""
    from sparsify.backends import predict

    if predict.compiles_ahead(device):
        return Check("compile ahead", "ok", "kernels are compiled in a process of their own")
    return Check("compile ahead", "ok", f"not needed: no Triton kernels on {device}")


def trial(device: torch.device) -> Check:
    """A small causal attention, compiled under `strict` and compared with eager PyTorch."""
    return Check("trial", *_attempt(lambda: _compiled_and_eager(device)))


def _attempt(error_of: Callable[[], float]) -> tuple[Status, str, str]:
    try:
        error = error_of()
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        return "fail", f"{type(failure).__name__}: {lines[0] if lines else ''}", "TORCH_LOGS=+sparsify sparsify doctor --try"
    if not error <= _TOLERANCE:
        return "fail", f"a compiled attention differs from eager by {error:.1e}", "sparsify diff MODEL, to see whether your model differs"
    return "ok", f"a compiled attention is within {error:.1e} of eager", ""


_TOLERANCE = 1e-2  # of half precision, relative to the largest number


def _compiled_and_eager(device: torch.device) -> float:
    import torch
    import torch.nn.functional as F

    from sparsify import api

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operands = [torch.randn(1, heads, 512, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    options: dict[str, Any] = {"passes": ["sink_window", "dense"], "min_length": 0, "strict": True, "sink_window": {"window": 1 << 20}}
    with torch.no_grad(), api.collect_plans() as plans:
        compiled = torch.compile(attend, backend="sparsify", options=options)(*operands)
    if sum(len(plan.rewritten) for plan in plans) != 1:
        raise SparsifyError(f"the attention was not rewritten: {'; '.join(d.reason for plan in plans for d in plan.decisions)}")
    eager = attend(*(one.float() for one in operands))
    return float((compiled.float() - eager).abs().max() / eager.abs().max())
