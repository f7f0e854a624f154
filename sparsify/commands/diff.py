"""`sparsify diff`: a model eager against compiled, down to the first site whose rewriting makes the difference."""

from __future__ import annotations

import argparse
import pprint
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import folders
from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DIFFERS, DONE
from sparsify.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.testing import Culprit


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    parser = commands.add_parser(
        "diff",
        parents=[arguments.model_options(), arguments.common_options()],
        help="eager against compiled; names the first site that differs",
    )
    parser.add_argument("--keep-all", action="store_true", help="with settings under which every lossy method must equal dense")
    parser.add_argument("--tolerance", metavar="X", type=float, help="largest relative error of the logits (default: by dtype)")
    parser.add_argument(
        "--repro", metavar="FILE", default="sparsify_repro.py", help="script written when they differ (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    from sparsify import testing

    _, options = loading.load_config(given)
    if given.tolerance is not None and not given.tolerance >= 0:
        raise ConfigError(f"must be at least 0, not {given.tolerance}", where="--tolerance")
    model, ids = loading.load_model_and_tokens(given)
    inputs = {"input_ids": ids, "use_cache": False}
    with testing.settings(options, given.keep_all) as effective:
        culprit, whole = testing.bisect(
            model,
            inputs,
            options=effective,
            tolerance=given.tolerance,
            on_step=lambda step, result: print(f"{step}: {result}", flush=True),
        )
        if culprit is None:
            return DIFFERS if whole.plan.fallback else DONE
        print(f"first to leave the tolerance: {culprit}")
        _write_repro(given, ids, culprit)
    return DIFFERS


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
    print(f"repro script: {given.repro}")
