"""`make demo`: a small trained model finds facts in a long prompt, dense and sparse, on a CPU.

    python -m benchmarks.demo                # fresh facts every time; the seed is printed
    python -m benchmarks.demo --seed 7

Shows the answers of both, what sparsify did (the explain table) and, as PNG, which blocks each head chose. Exits with 1 when dense
attention answers under 90 %, when sparse attention loses more than one answer, or when it visits half of the blocks or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from benchmarks.lib import needles
from sparsify.testing import Selection, record_blocks

MODEL = Path(__file__).parent / "models" / "demo"
MOST_DENSITY = 0.5
LEAST_DENSE = 0.9
MOST_LOST = 1


def answers(logits: torch.Tensor, item: needles.Prompt) -> list[str]:
    """What the model says where the answers stand, as text."""
    guesses = logits[0].argmax(-1)
    return [bytes(guesses[start - 1 : start - 1 + size].tolist()).decode("latin-1") for start, size in item.answers]


def verdict(dense: int, sparse: int, asked: int, density: float) -> list[str]:
    """What went wrong, in words; empty when the demo shows what it should."""
    problems = []
    if dense < LEAST_DENSE * asked:
        problems.append(f"dense attention answered {dense} of {asked}, fewer than {LEAST_DENSE:.0%}")
    if sparse < dense - MOST_LOST:
        problems.append(f"sparse attention answered {sparse}, more than {MOST_LOST} fewer than dense ({dense})")
    if not density < MOST_DENSITY:
        problems.append(f"sparse attention visited {density:.1%} of the blocks, not under {MOST_DENSITY:.0%}")
    return problems


def answer_table(item: needles.Prompt, dense: list[str], sparse: list[str]) -> Table:
    data = bytes(item.ids[0].tolist())
    table = Table(title="Answers (a fact somewhere in the prompt, asked for at its end)")
    for name in ("asked", "fact, bytes before", "true", "dense", "sparse"):
        table.add_column(name, justify="right")
    for (start, size), first, second in zip(item.answers, dense, sparse, strict=True):
        key, value = data[start - 8 : start - 2], data[start : start + size].decode()
        marked = [ascii(said)[1:-1] + (" ✓" if said == value else " ✗") for said in (first, second)]
        table.add_row(f"?? {key.decode()}", str(start - data.index(b"## " + key)), value, *marked)
    return table


def picture(maps: list[torch.Tensor], path: Path, title: str) -> None:
    """One panel a layer and head: chosen blocks dark, causal blocks left out light. maps: [batch, heads, query_blocks, key_blocks] each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    heads = maps[0].shape[1]
    figure, axes = pyplot.subplots(len(maps), heads, figsize=(2.3 * heads, 2.5 * len(maps) + 0.5), squeeze=False, layout="constrained")
    for layer, chosen in enumerate(maps):
        for head in range(heads):
            blocks = chosen[0, head]
            causal = torch.ones_like(blocks).tril()
            axis = axes[layer][head]
            shown = (causal.int() + (blocks & causal).int()).numpy()
            axis.imshow(shown, cmap=ListedColormap(["white", "#d8e2ee", "#14406b"]), vmin=0, vmax=2)
            share = float((blocks & causal).sum() / causal.sum())
            axis.set_title(f"layer {layer}, head {head}: {share:.0%}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("key block", fontsize=9)
    figure.supylabel("query block", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(console: Console, item: needles.Prompt, dense: torch.Tensor, sparse: torch.Tensor, selections: list[Selection]) -> list[str]:
    """Prints answers, shares and densities; returns what went wrong. dense, sparse: logits [1, n, 256]."""
    right = [needles.right_answers(logits, item) for logits in (dense, sparse)]
    console.print(answer_table(item, answers(dense, item), answers(sparse, item)))
    for name, logits, good in zip(("dense", "sparse"), (dense, sparse), right, strict=True):
        console.print(f"{name}: {sum(good)} of {len(good)} right, NLL {needles.text_nll(logits, item):.3f} nats a byte")
    by_layer = [selection.density for selection in selections]
    density = sum(by_layer) / len(by_layer)
    console.print(f"density {density:.1%} of the causal blocks (by layer: {', '.join(f'{share:.1%}' for share in by_layer)})")
    return verdict(sum(right[0]), sum(right[1]), len(right[0]), density)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, help="file to hide the facts in; without it, source of Python's standard library")
    parser.add_argument("--seed", type=int, help="names one prompt; without it, a fresh one")
    parser.add_argument("--length", type=int, default=6000, help="prompt length in bytes (a token is a byte)")
    parser.add_argument("--needles", type=int, default=24, help="facts in the prompt")
    parser.add_argument("--asks", type=int, default=20, help="questions at its end")
    parser.add_argument("--config", type=Path, help="how to make it sparse; without it, sparsify.toml beside the model")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        print('the demo draws a picture and needs matplotlib: pip install "sparsify-compiler[plot,hf]"', file=sys.stderr)
        return 2
    import sparsify

    console = Console()
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 31)
    text = options.text.read_bytes() if options.text else needles.stdlib_text(4_000_000)
    item = needles.prompt(options.length, text, seed, options.needles, options.asks)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    facts = f"{options.length} bytes, {options.needles} facts, {len(item.answers)} questions, seed {seed}"
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {facts}")

    inputs: dict[str, Any] = {"input_ids": item.ids, "use_cache": False}
    start = time.monotonic()
    dense = model(**inputs).logits
    console.print(f"dense, eager: {time.monotonic() - start:.1f} s")

    settings = {"config": str(options.config or options.model / "sparsify.toml")}
    print(f"\n{sparsify.explain(model, options=settings, **inputs)}\n", flush=True)  # wider than a narrow terminal, so not wrapped
    model.compile(backend="sparsify", options=settings)
    start = time.monotonic()
    with record_blocks() as selections:
        sparse = model(**inputs).logits
    console.print(
        f"sparse, compiled: {time.monotonic() - start:.1f} s, compiling included (a CPU runs the plain reference, not a fast kernel)"
    )
    if len(selections) != model.config.num_hidden_layers:
        console.print(f"{len(selections)} of {model.config.num_hidden_layers} layers chose blocks: this is not the sparse model")
        return 1
    picture([selection.mask() for selection in selections], options.out / "blocks.png", f"chosen blocks of 128 tokens, {facts}")
    problems = report(console, item, dense, sparse, selections)
    console.print(f"picture: {options.out / 'blocks.png'}")
    for problem in problems:
        console.print(f"failed: {problem}; --seed {seed} repeats it")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
