"""What people write on the command line: lengths such as 4K, model folders and hub names, devices, and the options of several commands."""

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


def common_options() -> argparse.ArgumentParser:
    """The options of every command that has a configuration, as a parent of its parser."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--config", metavar="FILE", help="a configuration file, after sparsify.toml and SPARSIFY_CONFIG")
    options.add_argument(
        "-o", "--option", metavar="KEY=VALUE", action="append", default=[], help="one setting, such as xattention.stride=16"
    )
    options.add_argument("--debug", action="store_true", help="show tracebacks")
    return options


def model_options() -> argparse.ArgumentParser:
    """The model and its prompt, as a parent of the parsers of commands that run it."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    what = options.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="FILE", help="text to run the model on; bytes become tokens where the model has no tokenizer")
    what.add_argument("--length", metavar="N", type=tokens, help=f"run on N random tokens, as 4K (default: {LENGTH}, if they fit)")
    options.add_argument("--max-tokens", metavar="N", type=tokens, help="only the prompt's first N tokens")
    add_device_and_dtype(options)
    options.add_argument(
        "--attention", metavar="NAME", default="sdpa", help="transformers' attention implementation (default: %(default)s)"
    )
    return options


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision a model is loaded."""
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the model's own")


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
