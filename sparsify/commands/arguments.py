"""What people write on the command line: lengths such as 4K, model folders and hub names, devices."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from sparsify.errors import UnsupportedError

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
LENGTH = 1024  # of random prompts, where the model has as many positions


def count(text: str) -> int | None:
    """The number that `4096`, `4K` or `1m` mean (K is 1024, M is 1024²), None for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", text, re.ASCII)
    return int(match[1]) * UNITS[match[2].lower()] if match else None


def tokens(text: str) -> int:
    """An argparse type: at least one token."""
    found = count(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 4096 or 4K")
    return found


def tokens_or_none(text: str) -> int:
    """An argparse type: tokens, 0 too."""
    return 0 if count(text) == 0 else tokens(text)


def check_model(name: str) -> None:
    """Raises UnsupportedError where a name can be no hub name and leads to no folder."""
    path = Path(name).expanduser()
    looks_like_a_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_dir():
        trouble = "" if (path / "config.json").is_file() else "the folder has no config.json"
    elif path.exists():
        trouble = "it is a file: name its folder"
    else:
        trouble = "there is no such folder" if looks_like_a_path else ""
    if trouble:
        raise UnsupportedError(f"cannot load the model: {trouble}", where=name)


def device(name: str | None) -> str:
    """A device that is here: the GPU, or the CPU where there is none, unless one is named.

    Raises:
        UnsupportedError: there is no such device.
    """
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if here else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError(f"cannot use device {name!r}: {str(error).splitlines()[0]}", where="--device") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= here:
        what = "there is no CUDA device here" if not here else f"the CUDA devices here are 0 to {here - 1}"
        raise UnsupportedError(f"cannot use device {name!r}: {what}", where="--device", hint="--device cpu" if not here else "")
    return name


def positions(model: Any) -> int | None:
    """Tokens that a model can tell apart, None where its configuration names no number."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def versions() -> str:
    """sparsify's version and those of what it works with, in one line."""
    import importlib.metadata

    import sparsify

    found = [f"sparsify {sparsify.__version__}"]
    for name in ("torch", "triton", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
