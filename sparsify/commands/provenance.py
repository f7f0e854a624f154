"""What numbers depend on, to be kept beside them: versions, device, commit, digests of files."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sparsify

COMMIT_VARIABLE = "SPARSIFY_COMMIT"  # for machines that get the files without the history


def version(distribution: str) -> str | None:
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
    if not commit or _output("git", "ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed inside another repository
        return None
    # results are appended while a benchmark runs: they do not change what was measured
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit + ("+changes" if changed else "")


@functools.cache
def _machine() -> tuple[tuple[str, Any], ...]:
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
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
