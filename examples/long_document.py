"""Facts in a long document, asked for at its end: dense attention, then a third of it.

    python examples/long_document.py [--length 3000] [--seed 0]

The model is bundled: a small Llama whose tokens are bytes, trained to find facts like `## qwerty: 314159` when it is asked
`?? qwerty: `. At these lengths nothing is gained in time: what this shows is that the answers stay.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import sparsify

MODEL = Path(__file__).parents[1] / "benchmarks" / "models" / "demo"
FACTS, ASKED = 8, 2
VALUE = 6  # digits of a value


def document(length: int, seed: int) -> tuple[str, dict[str, str]]:
    """A text of `length` bytes with facts at random places, and the facts."""
    draw = random.Random(seed)
    facts = {"".join(draw.choices(string.ascii_lowercase, k=6)): "".join(draw.choices(string.digits, k=VALUE)) for _ in range(FACTS)}
    source = Path(argparse.__file__).read_text(encoding="ascii", errors="ignore")
    room = length - sum(len(f"\n## {key}: {value}\n") for key, value in facts.items())
    cuts = sorted(draw.sample(range(room), FACTS))
    parts = [source[start:end] for start, end in zip([0, *cuts], [*cuts, room], strict=True)]
    return parts[0] + "".join(f"\n## {key}: {value}\n{part}" for (key, value), part in zip(facts.items(), parts[1:], strict=True)), facts


def tokens(text: str) -> torch.Tensor:
    """[1, n] int64: the model's tokens are bytes."""
    return torch.tensor([list(text.encode())])


@torch.no_grad()
def ask(model: LlamaForCausalLM, text: str, key: str) -> str:
    prompt = tokens(f"{text}\n?? {key}: ")
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=VALUE, do_sample=False, pad_token_id=0)
    return bytes(said[0, prompt.shape[1] :].tolist()).decode("latin-1")


def main(arguments: list[str] | None = None) -> dict[str, int]:
    """Prints what the model answers; returns how many answers are right by the way that attention was computed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=3000, help="bytes of the document (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    text, facts = document(given.length, given.seed)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    # the model's own settings; a big model on a GPU needs none: `model.compile(backend="sparsify")`
    options = {"config": str(MODEL / "sparsify.toml"), "lower": "eager"}  # eager: no time to compile, fitting a CPU
    print(sparsify.explain(model, input_ids=tokens(text), use_cache=False, options=options))
    right = {}
    for name in ("dense", "sparse"):
        if name == "sparse":
            model.compile(backend="sparsify", options=options)
        started = time.perf_counter()
        answers = {key: ask(model, text, key) for key in list(facts)[:ASKED]}
        right[name] = sum(answers[key] == facts[key] for key in answers)
        print(f"{name}: {right[name]} of {ASKED} right, {time.perf_counter() - started:.1f} s: {answers}")
    return right


if __name__ == "__main__":
    main()
