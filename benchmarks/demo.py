"""`make demo`: a small trained model finds facts in a long prompt, dense and sparse, on a CPU.

    python -m benchmarks.demo                # fresh facts every time; the seed is printed
    python -m benchmarks.demo --seed 7

Shows the answers and seconds of both, what sparsify did (the explain table) and, as PNG, what share of the blocks each head visits
and which blocks four of them chose. Exits with 1 when dense attention answers under 90 %, when sparse attention loses more than one
answer, or when it visits half of the blocks or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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


def picture(maps: list[torch.Tensor], path: Path, title: str, facts: Sequence[Fact] = ()) -> None:
    """A map of every head's density, and four telling heads large, with the key blocks that hold facts which were asked for.

    Args:
        maps: of each layer, bool [batch, heads, query_blocks, key_blocks].
        facts: the facts of the prompt that were asked for.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    causal = torch.ones(maps[0].shape[2:], dtype=torch.bool).tril()
    density = torch.stack([(one[0] & causal).sum((-1, -2)) / causal.sum() for one in maps])
    figure = pyplot.figure(figsize=(13, 7.2), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 2.2))
    left, right = halves
    axis = left.subplots()
    axis.imshow(density.numpy(), cmap="Greys", vmin=0, vmax=1)
    for layer, shares in enumerate(density.tolist()):
        for head, share in enumerate(shares):
            axis.text(head, layer, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.5 else "black")
    axis.set(title="share of the blocks that each head visits", xlabel="head", ylabel="layer")
    axis.set_xticks(range(density.shape[1]))
    axis.set_yticks(range(density.shape[0]))
    right.suptitle("black: visited; light grey: left out; ▼ a block with a fact that is asked for at the end", fontsize=9)
    for axis, (words, layer, head) in zip(right.subplots(2, 2).flat, telling(maps, density, facts), strict=False):
        blocks = maps[layer][0, head]
        axis.imshow((causal.float() * 0.15 + (blocks & causal).float() * 0.85).numpy(), cmap="Greys", vmin=0, vmax=1)
        axis.set_title(f"{words}\nlayer {layer}, head {head}: {density[layer, head]:.0%}", fontsize=9, pad=30)
        axis.set(xlabel="key block", ylabel="query block")
        axis.plot([fact.block for fact in facts], [-1.5] * len(facts), "v", color="black", clip_on=False, markersize=4)
        axis.set_ylim(len(causal) - 0.5, -0.5)
        for fact in facts[:: max(1, len(facts) // 6)]:
            axis.annotate(fact.key, (fact.block, -1.5), (-2, 5), textcoords="offset points", rotation=50, fontsize=6, annotation_clip=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def telling(maps: list[torch.Tensor], density: torch.Tensor, facts: Sequence[Fact]) -> list[tuple[str, int, int]]:
    """Up to four heads that differ, with what they do in words: (words, layer, head)."""
    rows, cols = maps[0].shape[2:]
    far = torch.ones(rows, cols, dtype=torch.bool).tril(-2)  # neither the own block nor the one before
    far[:, 0] = False
    blocks = sorted({fact.block for fact in facts})
    asking = slice(rows - max(1, rows // 8), rows)  # the questions stand at the end
    fetched = torch.stack([one[0][:, asking][..., blocks].any(1).float().mean(-1) if blocks else one[0, :, 0, 0] * 0.0 for one in maps])
    distant = torch.stack([(one[0] & far).sum((-1, -2)) for one in maps]).float()
    ways = {
        "fetches facts: its last rows visit their blocks": fetched - density,
        "looks nearby: fewest blocks far away": -distant,
        "chooses about half of the blocks": -(density - 0.5).abs(),
        "visits most": density,
    }
    found: list[tuple[str, int, int]] = []
    for words, score in ways.items():
        taken = {(layer, head) for _, layer, head in found}
        order = score.flatten().argsort(descending=True).tolist()
        places = (divmod(at, density.shape[1]) for at in order)
        if (place := next((place for place in places if place not in taken), None)) is not None:
            found.append((words, *place))
    return found


@dataclass(frozen=True)
class Fact:
    """A fact that is asked for. key: its name; block: the key block in which it stands."""

    key: str
    block: int


def asked_facts(item: needles.Prompt, block: int) -> list[Fact]:
    """The facts that the prompt's end asks for, by place."""
    data = bytes(item.ids[0].tolist())
    keys = {data[start - 8 : start - 2] for start, _ in item.answers}
    return sorted((Fact(key.decode(), data.index(b"## " + key) // block) for key in keys), key=lambda fact: fact.block)


def report(
    console: Console,
    item: needles.Prompt,
    dense: torch.Tensor,
    sparse: torch.Tensor,
    selections: list[Selection],
    seconds: tuple[float, float],
) -> list[str]:
    """Prints answers, seconds and densities; returns what went wrong. dense, sparse: logits [1, n, 256]; seconds: of both."""
    right = [needles.right_answers(logits, item) for logits in (dense, sparse)]
    console.print(answer_table(item, answers(dense, item), answers(sparse, item)))
    by_layer = [selection.density for selection in selections]
    density = sum(by_layer) / len(by_layer)
    table = Table(title="Dense against sparse")
    for name in ("attention", "answers right", "NLL, nats a byte", "blocks visited", "seconds"):
        table.add_column(name, justify="right")
    for name, logits, good, share, time_ in zip(("dense", "sparse"), (dense, sparse), right, (1.0, density), seconds, strict=True):
        table.add_row(name, f"{sum(good)} of {len(good)}", f"{needles.text_nll(logits, item):.3f}", f"{share:.1%}", f"{time_:.2f}")
    console.print(table)
    console.print(f"by layer: {', '.join(f'{share:.1%}' for share in by_layer)} of the causal blocks")
    return verdict(sum(right[0]), sum(right[1]), len(right[0]), density)


def timed(model: LlamaForCausalLM, inputs: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Logits of a call, and its seconds."""
    start = time.monotonic()
    logits = model(**inputs).logits
    return logits, time.monotonic() - start


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, help="file to hide the facts in; without it, source of Python's standard library")
    parser.add_argument("--seed", type=int, help="names one prompt; without it, a fresh one")
    parser.add_argument("--length", type=int, default=8000, help="prompt length in bytes (a token is a byte)")
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
    import transformers

    import sparsify
    from sparsify import progress

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # torch's about this machine; what goes wrong here is said below
    console = Console()
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 31)
    text = options.text.read_bytes() if options.text else needles.stdlib_text(4_000_000)
    item = needles.prompt(options.length, text, seed, options.needles, options.asks)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    facts = f"{options.length} bytes, {options.needles} facts, {len(item.answers)} questions, seed {seed}"
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {facts}")

    inputs: dict[str, Any] = {"input_ids": item.ids, "use_cache": False}
    with progress.task("dense attention"):
        dense, dense_seconds = timed(model, inputs)
    settings = {"config": str(options.config or options.model / "sparsify.toml")}
    print(f"\n{sparsify.explain(model, options=settings, **inputs)}\n", flush=True)  # wider than a narrow terminal, so not wrapped
    model.compile(backend="sparsify", options=settings)
    with progress.task("compiling"):
        _, first_seconds = timed(model, inputs)
    with record_blocks() as selections, progress.task("sparse attention"):
        sparse, sparse_seconds = timed(model, inputs)
    console.print(f"compiled once, in the first call: {first_seconds:.1f} s")
    if len(selections) != model.config.num_hidden_layers:
        console.print(f"{len(selections)} of {model.config.num_hidden_layers} layers chose blocks: this is not the sparse model")
        return 1
    size = selections[0].block_size
    title = f"which blocks of {size} tokens attention visits: {facts}"
    picture([selection.mask() for selection in selections], options.out / "blocks.png", title, asked_facts(item, size))
    problems = report(console, item, dense, sparse, selections, (dense_seconds, sparse_seconds))
    console.print(f"picture: {options.out / 'blocks.png'}")
    model_folder = os.path.relpath(options.model)
    console.print(f"next: .venv/bin/sparsify cost {model_folder} --lengths 4K..64K --device cpu", soft_wrap=True)
    for problem in problems:
        console.print(f"failed: {problem}; --seed {seed} repeats it")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
