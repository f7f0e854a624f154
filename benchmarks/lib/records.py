"""Results as JSON lines that say where they come from: versions, GPU, driver, commit, digests of model and text, seeds, time.

One record a line, appended as soon as it is measured, so that a run that is cut short loses nothing. Tables and plots are made from these
files alone (`python -m benchmarks report`).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

RESULTS = Path(__file__).parents[1] / "results"
COMMIT_VARIABLE = "SPARSIFY_COMMIT"  # for machines that get the files without the history


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def code_version() -> str | None:
    """The commit, with `+changes` where tracked files differ from it; None when unknown."""
    if commit := os.environ.get(COMMIT_VARIABLE):
        return commit
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return None
    # results are appended while a benchmark runs: they do not change what was measured
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit + ("+changes" if changed else "")


@functools.cache
def _machine() -> tuple[tuple[str, Any], ...]:
    import sparsify

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sparsify": sparsify.__version__,
        "python": platform.python_version(),
        "commit": code_version(),
        "gpu": None,
        "driver": None,
        "cpu_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0] or None
    return tuple(facts.items())


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code: versions and device. Unknown facts are None, never left out."""
    return dict(_machine())


def sha256(path: Path) -> str:
    """Hex digest of a file, or of a model folder: names and contents of its configuration and weights, in order of name."""
    digest = hashlib.sha256()
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".safetensors"})
        if not files:
            raise FileNotFoundError(f"{path} holds no .json or .safetensors file")
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one line says; a subclass lists its fields, with units.

    NAME: the line's `benchmark`. KEYS: the fields that tell cells of a table apart; of several records of one cell the latest counts.
    A field that defaults to None is left out where it is None: it was not measured, or did not exist when older lines were written.
    `more`, where a subclass has it, holds values whose names depend on what ran.
    """

    NAME: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]] = ()

    def values(self) -> dict[str, Any]:
        pairs = ((one, getattr(self, one.name)) for one in fields(self))
        found = {one.name: value for one, value in pairs if one.default is not None or value is not None}
        return found | found.pop("more", {})


def append(path: Path, record: Record) -> dict[str, Any]:
    """Appends one line to `path` and returns it as a dictionary. Raises ValueError for NaN and infinities, which are not JSON."""
    line = {
        "benchmark": record.NAME,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **record.values(),
        "machine": machine(),
    }
    text = json.dumps(line, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(text + "\n")
    return line


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The lines of the files, oldest file first. Raises ValueError naming the file and line of anything that is no record."""
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                record["benchmark"], record["time"], record["machine"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no record: {error}") from error
            yield record
