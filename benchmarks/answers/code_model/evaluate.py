"""What saved weights answer and foresee on packages that were held out."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.answers.code_model.decoder import PARTS, Decoder, rotary
from benchmarks.answers.code_model.feed import load_maker
from benchmarks.answers.code_model.setup import Setup
from benchmarks.lib import int8_weights, recall


def write_report(out: Path, report: dict[str, Any]) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def time_left(options: argparse.Namespace, began: float) -> bool:
    return time.time() < began + 60 * options.minutes


@torch.no_grad()
def evaluate(
    options: argparse.Namespace, setup: Setup, device: torch.device, began: float, say: Callable[[str], None], report: dict[str, Any],
    trained: Decoder,
) -> None:  # fmt: skip
    """What the saved files answer and foresee on packages that were held out, through transformers alone; fills `report`."""
    model = int8_weights.load(options.out, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    maker = load_maker(options.work, "held_out")
    ids = torch.from_numpy(maker.text[: setup.look[0] + 1].astype(np.int64)).to(device)[None]
    tables = rotary(setup, setup.look[0], setup.look[0], device)
    trained.parts = PARTS  # compiled for other sizes
    each, _ = trained(ids[:, :-1], ids[:, 1:], tables, model.dtype)
    loaded = F.cross_entropy(model(ids[:, :-1], use_cache=False).logits[0].float(), ids[0, 1:])
    say(f"loss of one text: {float(each.mean()):.4f} as trained, {float(loaded):.4f} as int8 through transformers")
    report["loss_of_one_text"] = {"trained": float(each.mean()), "int8": float(loaded)}
    prompts = options.prompts
    report["nll"], report["answers"] = {}, {}
    for length in setup.look:
        if not time_left(options, began):
            break
        losses = []
        for start in np.linspace(0, len(maker.text) - length - 2, prompts).astype(int):
            ids = torch.from_numpy(maker.text[start : start + length + 1].astype(np.int64)).to(device)[None]
            losses.append(F.cross_entropy(model(ids[:, :-1], use_cache=False).logits[0, -1024:].float(), ids[0, -1024:]).item())
        report["nll"][length] = sum(losses) / len(losses)
        say(f"held-out text, last 1024 of {length} tokens: {report['nll'][length]:.4f} nats a token")
    for length in setup.look:
        report["answers"][length] = {}
        for name, task in recall.asked(maker, length).items():
            if not time_left(options, began):
                break
            right = asked = 0
            for seed in range(prompts):
                tokens, codes = task(random.Random(f"{name} {length} {seed}"))
                ids = torch.from_numpy(tokens.astype(np.int64)).to(device)[None]
                guesses = model(ids, use_cache=False).logits[0].argmax(-1)
                for start, count in recall.answers(codes):
                    right += bool((guesses[start - 1 : start - 1 + count] == ids[0, start : start + count]).all())
                    asked += 1
            report["answers"][length][name] = [right, asked]
        say(f"answers at {length}: " + ", ".join(f"{name} {a}/{b}" for name, (a, b) in report["answers"][length].items()))
        write_report(options.out, report)
    prompt = torch.tensor([maker.tokenizer.encode("import numpy as np\n\n\ndef main(").ids], device=device)
    made = model.generate(prompt, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(prompt))
    say("a continuation: " + repr(maker.tokenizer.decode(made[0].tolist())))
