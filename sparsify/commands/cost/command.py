"""`sparsify cost`: what a model's prefill, decode and memory would be at which length, and what would be chosen; nothing is run."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE
from sparsify.errors import ConfigError

DEFAULT_LENGTHS = "4K..1M"
_LONGEST, _MOST = 1 << 24, 64


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    cost = commands.add_parser(
        "cost", parents=[arguments.common_options()], help="predicted prefill, decode, memory and choice by length, without running"
    )
    cost.add_argument("model", metavar="MODEL", help="a folder with a config.json, or a hub name")
    cost.add_argument(
        "--lengths", metavar="LENGTHS", default=DEFAULT_LENGTHS, help="tokens: 4K..1M doubles, 8192,32K lists (default: %(default)s)"
    )
    cost.add_argument("--batch", metavar="B", type=int, default=1, help="sequences (default: %(default)s)")
    cost.add_argument("--image-tokens", metavar="N", type=int, default=0, help="of each prompt (default: %(default)s)")
    cost.add_argument("--device", metavar="NAME", help="h200, h100, a100, ..., or a profile file; default: the GPU here")
    cost.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the configuration's")
    cost.add_argument("--attention", metavar="NAME", default="sdpa", help="transformers' attention implementation (default: %(default)s)")
    cost.add_argument("--budget", metavar="N", help="decode over a SparseCache: tokens per KV head, or a share of the prompt such as 0.1")
    cost.add_argument("--policy", metavar="NAME", default="streaming_llm", help="with --budget: what stays (default: %(default)s)")
    cost.add_argument(
        "--gpus", metavar="N", type=int, default=1, help="that share the model, by heads, by prompts or by both: compares these"
    )
    cost.add_argument("--generate", metavar="N", type=int, default=256, help="with --gpus: tokens after each prompt (default: %(default)s)")
    cost.add_argument("--why", action="store_true", help="also print the reasons at the longest length")
    cost.add_argument("--plot", metavar="FILE", help="draw time and memory over length")
    cost.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    cost.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    lengths = parse_lengths(given.lengths)
    if given.batch < 1:
        raise ConfigError(f"must be at least 1, not {given.batch}", where="--batch")
    if given.image_tokens < 0:
        raise ConfigError(f"must be at least 0, not {given.image_tokens}", where="--image-tokens")
    if given.gpus < 1 or given.generate < 0 or (given.gpus > 1 and given.plot):
        raise ConfigError("at least one GPU, no fewer than 0 tokens, and a plot of one GPU alone", where="--gpus, --generate")
    budget = parse_budget(given.budget)
    arguments.check_model(given.model)

    import torch

    from sparsify import SparseCache, pipeline
    from sparsify.commands.cost import device as forecast_device
    from sparsify.commands.cost import forecaster, meta_model, report
    from sparsify.costs import device as hardware

    settings, _ = loading.load_config(given)
    device = forecast_device.named(given.device)
    model = meta_model.build(given.model, dtype=None if given.dtype == "auto" else getattr(torch, given.dtype), attention=given.attention)
    here = torch.cuda.is_available() and device == hardware.describe(torch.device("cuda"))
    context = pipeline.make_context(torch.device("cuda"), settings) if here else forecast_device.context(device, settings)
    make_cache = None if budget is None else lambda config: SparseCache(config, given.policy, budget)
    asked = forecaster.Forecaster(model, settings, context, given.batch, make_cache, images=given.image_tokens)
    if given.gpus > 1:
        return _several(given, asked, lengths)
    found = asked.forecast(lengths, "" if budget is None else f"SparseCache {given.policy}, budget {given.budget}")
    if given.plot:
        report.plot(found, given.plot)
    if given.json:
        print(json.dumps(report.data(found), indent=1))
    else:
        width = 160 if not sys.stdout.isatty() else None
        print(report.table(found, width, given.why))
    return DONE


def _several(given: argparse.Namespace, asked: Any, lengths: list[int]) -> int:
    """Prints what GPUs take that share the model, in every way that its heads allow."""
    from sparsify.commands.cost import device as forecast_device
    from sparsify.commands.cost import ways

    found = ways.compare(asked, lengths, given.gpus, given.generate, forecast_device.memory(given.device, asked.context.device))
    print(json.dumps(ways.data(found), indent=1) if given.json else ways.table(found, 160 if not sys.stdout.isatty() else None))
    return DONE


def parse_lengths(text: str) -> list[int]:
    """`4K..1M` doubles from 4096 to 1048576; `8192,32K` lists; both may be mixed. K is 1024, M is 1024².

    Raises:
        ConfigError: anything else, and lengths below 2 or beyond 16M.
    """
    found: set[int] = set()
    for piece in text.split(","):
        low, dots, high = piece.partition("..")
        if not dots:
            found.add(_length(piece, text))
            continue
        start, end = _length(low, text), _length(high, text)
        if start > end:
            raise ConfigError(f"{piece.strip()!r} is empty", where=f"--lengths {text}", hint=f"write {high.strip()}..{low.strip()}")
        while start < end:
            found.add(start)
            start *= 2
        found.add(end)
    if len(found) > _MOST:
        raise ConfigError(f"{len(found)} lengths are too many", where="--lengths", hint=f"at most {_MOST}")
    return sorted(found)


def _length(text: str, whole: str) -> int:
    length = arguments.count(text)
    where = f"--lengths {whole}"
    if length is None:
        raise ConfigError(f"{text.strip()!r} is not a length", where=where, hint="for example 4K..1M or 8192,32K")
    if not 2 <= length <= _LONGEST:
        raise ConfigError(f"{text.strip()!r} lies outside 2 to 16M tokens", where=where)
    return length


def parse_budget(text: str | None) -> int | float | None:
    """Tokens, with K and M as in lengths, or a share below 1.

    Raises:
        ConfigError: neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"0?\.\d+|1\.0*", text) and float(text) > 0:
        return float(text)
    found = arguments.count(text)
    if not found:
        raise ConfigError(f"{text!r} is no budget", where="--budget", hint="tokens such as 4096 or 4K, or a share such as 0.1")
    return found
