"""`sparsify diff`: a model eager against compiled, down to the first site whose rewriting makes the difference."""

from __future__ import annotations

import argparse
import json
import math
import pprint
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import folders
from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DIFFERS, DONE
from sparsify.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.testing import Comparison, Culprit


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    parser = commands.add_parser(
        "diff",
        parents=[arguments.model_options(), arguments.common_options()],
        help="eager against compiled; names the first site that differs",
    )
    parser.add_argument(
        "--keep-all", action="store_true", help="lossy methods act at any length, with everything kept: each must equal dense"
    )
    parser.add_argument("--tolerance", metavar="X", type=float, help="largest relative error of the logits (default: by dtype)")
    parser.add_argument(
        "--repro", metavar="FILE", default="sparsify_repro.py", help="script written when they differ (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print every comparison, and what was found, as JSON at the end")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    from sparsify import testing

    _, options = loading.load_config(given)
    if given.tolerance is not None and not given.tolerance >= 0:
        raise ConfigError(f"must be at least 0, not {given.tolerance}", where="--tolerance")
    model, ids = loading.load_model_and_tokens(given)
    inputs = {"input_ids": ids, "use_cache": False}
    steps: dict[str, Comparison] = {}

    def on_step(step: str, result: Comparison) -> None:
        steps[step] = result
        if not given.json:
            print(f"{step}: {result}", flush=True)

    culprit, whole = testing.bisect(
        model,
        inputs,
        options=options,
        keep_all=given.keep_all,
        tolerance=given.tolerance,
        on_step=on_step,
    )
    if culprit is not None:
        _write_repro(given, ids, culprit)
    if given.json:
        print(json.dumps(_data(steps, culprit, given.repro), indent=1))
    elif culprit is not None:
        print(f"first to leave the tolerance: {culprit}\nrepro script: {given.repro}")
    return DIFFERS if culprit is not None or whole.plan.fallback else DONE


def _data(steps: Mapping[str, Comparison], culprit: Culprit | None, repro: str) -> dict[str, Any]:
    numbers = ("relative_error", "bound", "error", "token_agreement", "kl", "rows", "density", "rewritten", "kept", "close")
    listed = [{"step": step, **{name: _number(getattr(result, name)) for name in numbers}} for step, result in steps.items()]
    found = None
    if culprit is not None:
        found = {name: getattr(culprit, name) for name in ("kind", "method", "site", "alone", "options")} | {"repro": repro}
    return {"steps": listed, "culprit": found}


def _number(value: float | None) -> float | None:
    """JSON has no infinity, nor NaN."""
    return value if value is None or math.isfinite(value) else None


_REPRO = '''\
"""{title}

Exits with 1 when the compiled model leaves the tolerance. Written by `sparsify diff`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from sparsify.testing import compare

MODEL = {model!r}
OPTIONS = {options}
TOLERANCE = {tolerance!r}  # relative to the largest logit
IDS = {ids}

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype={dtype}, attn_implementation={attention!r}).to({device!r}).eval()
inputs = {{"input_ids": torch.tensor([IDS], device={device!r}), "use_cache": False}}
result = compare(model, inputs, options=OPTIONS, tolerance=TOLERANCE)
print(result)
print(result.plan)
sys.exit(0 if result.close else 1)
'''


def _write_repro(given: argparse.Namespace, ids: Tensor, culprit: Culprit) -> None:
    folder = Path(given.model)
    numbers = textwrap.fill(", ".join(map(str, ids[0].tolist())), 120, initial_indent="    ", subsequent_indent="    ")
    text = _REPRO.format(
        title=f"Eager and compiled model differ: {culprit}.",
        model=str(folder.resolve()) if folder.is_dir() else given.model,
        options=pprint.pformat(culprit.options, width=120, sort_dicts=False),
        tolerance=culprit.comparison.bound,
        ids=f"[\n{numbers},\n]",
        dtype="'auto'" if given.dtype == "auto" else f"torch.{given.dtype}",
        attention=given.attention,
        device=str(ids.device),
    )
    try:
        folders.write(text, Path(given.repro))
    except OSError as error:
        raise UnsupportedError(f"cannot write the repro script: {error.strerror}", where=given.repro) from None
