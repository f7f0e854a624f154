"""How long `sparsify calibrate attention` takes on a model of a real size: from the command to the plan, loading included.

    python -m benchmarks run calibrating                                   # an 8B shape, 32K tokens
    python -m benchmarks run calibrating --shape tiny --lengths 512 --device cpu

The model is an 8B-shaped Llama with random weights, saved to a temporary folder first (16 GB), which is not counted: speed does not depend
on the weights, though where real heads are gathered fewer blocks are visited. Its tokens are the bytes of the standard library's source.
Every variant measures anew: `error` compares settings by the error of attention's outputs, `loss` by the text's loss, which takes a
backward pass. Appends to results/calibrating.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import models, records
from benchmarks.lib.needles import stdlib_text
from benchmarks.model import Calibrating
from sparsify.commands import main as commands
from sparsify.commands.bench.clock import reason
from sparsify.planning.plan import Plan

VARIANTS = ("error", "loss")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="what settings are compared by")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768], help="tokens of the prompts that are run")
    parser.add_argument("--pieces", type=int, default=4, help="prompts of each length")
    parser.add_argument("--density", type=float, default=0.1, help="of the plan")
    parser.add_argument("--shape", choices=list(models.SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--option", action="append", default=[], help="of `sparsify calibrate attention -o`")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "calibrating.jsonl")
    return parser.parse_args(arguments)


def measure(folder: Path, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the command, and peak memory in bytes. Raises RuntimeError where it fails."""
    lengths = ",".join(map(str, options.lengths))
    line = ["calibrate", "attention", str(folder / "model"), "--text", str(folder / "text"), "--lengths", lengths, "--weigh", variant]
    line += ["--pieces", str(options.pieces), "--density", str(options.density), "--save", str(folder / f"{variant}.json")]
    line += ["--device", options.device, "--target", "h200", *(word for one in options.option for word in ("-o", one))]
    models.clean(options.device)
    begin = time.perf_counter()
    if code := commands.main(line):
        raise RuntimeError(f"exit code {code}: sparsify {' '.join(line)}")
    found = {"s": time.perf_counter() - begin, "peak_bytes": models.peak_bytes(options.device)}
    return found | {"heads": sum(len(one.options.get("threshold", ())) for one in Plan.load(folder / f"{variant}.json").decisions)}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = models.build(options.shape, options.layers, options.device)
        layers = model.config.num_hidden_layers
        model.save_pretrained(folder / "model")
        del model
        folder.joinpath("text").write_bytes(stdlib_text(sum(options.lengths) * options.pieces + 1))
        for variant in options.variants:
            try:
                found = measure(folder, variant, options)
            except Exception as error:
                traceback.print_exc()
                failed, found = failed + 1, {"error": reason(error)}
            facts = {"shape": options.shape, "layers": layers, "variant": variant, "lengths": options.lengths, "pieces": options.pieces}
            record = records.append(options.out, Calibrating(**({"peak_bytes": None} | found), **facts, settings=options.option))
            print({key: record.get(key) for key in ("variant", "s", "peak_bytes", "heads", "error")}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
