"""`make demo`: a small trained model finds facts in a long prompt of code, dense and sparse, on a CPU.

    python -m benchmarks.demo                # fresh facts every time; the seed is printed
    python -m benchmarks.demo --seed 7

Shows the answers and seconds of both, what sparsify did (the explain table) and, as PNG, what share of the blocks each head visits
and which blocks four of them chose. Exits with 1 when dense attention answers under 90 %, when sparse attention loses more than one
answer, visits a quarter of the blocks or more, or needs more than 0.6 of dense attention's processor time for the whole call
(not where there is no C++ compiler, which the kernel needs).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib import code_model, code_prompt
from sparsify.backends import dispatch
from sparsify.testing import Selection, record_blocks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 16384
MOST_DENSITY = 0.25
MOST_TIME = 0.6  # of dense attention's processor time
LEAST_DENSE = 0.9
MOST_LOST = 1
WARM_UP = 1024  # tokens of the call that compiles; longer prompts compile nothing new
LOOKED_AT = 4096  # tokens of the prompt that explain runs: the same decisions in a tenth of the time
TEXT = 1024  # tokens before the questions, whose NLL is shown


@dataclass(frozen=True)
class Run:
    """A call.

    logits: [1, last tokens, vocabulary]. seconds: by the clock. processor: seconds of all threads, which other work does not change.
    """

    logits: torch.Tensor
    seconds: float
    processor: float


def verdict(dense: int, sparse: int, asked: int, density: float, time_ratio: float) -> list[str]:
    """What went wrong, in words; empty when the demo shows what it should.

    Args:
        dense: answers that are right, of `asked`.
        sparse: the same under sparse attention.
        density: visited share of the causal blocks.
        time_ratio: processor time of the sparse call over that of the dense one.
    """
    problems = []
    if dense < LEAST_DENSE * asked:
        problems.append(f"dense attention answered {dense} of {asked}, fewer than {LEAST_DENSE:.0%}")
    if sparse < dense - MOST_LOST:
        problems.append(f"sparse attention answered {sparse}, more than {MOST_LOST} fewer than dense ({dense})")
    if not density < MOST_DENSITY:
        problems.append(f"sparse attention visited {density:.1%} of the blocks, not under {MOST_DENSITY:.0%}")
    if not time_ratio <= MOST_TIME:
        problems.append(f"the sparse call took {time_ratio:.2f} of the dense call's processor time, more than {MOST_TIME}")
    return problems


def answer_table(item: code_prompt.Prompt, tokenizer: Tokenizer, dense: torch.Tensor, sparse: torch.Tensor) -> Table:
    table = Table(title="Answers (a fact somewhere in the prompt, asked for at its end)")
    for name in ("asked", "fact, tokens before", "true", "dense", "sparse"):
        table.add_column(name, justify="left" if name == "asked" else "right")
    for question, *said in zip(item.questions, item.guesses(dense), item.guesses(sparse), strict=True):
        words = [tokenizer.decode(tokens).strip() for tokens in said]
        marked = [ascii(word)[1:-1] + (" ✓" if word == question.value else " ✗") for word in words]
        table.add_row(question.text, str(question.start - question.fact), question.value, *marked)
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
        axis.set_title(f"{words}\nlayer {layer}, head {head}: {density[layer, head]:.0%}", fontsize=9, pad=58)
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
        "like most heads: visits about as much as their mean": -(density - density.mean()).abs(),
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


def asked_facts(item: code_prompt.Prompt, block: int) -> list[Fact]:
    """The facts that the prompt's end asks for, by place."""
    return sorted((Fact(one.key, one.fact // block) for one in item.questions), key=lambda fact: fact.block)


def report(
    console: Console, item: code_prompt.Prompt, tokenizer: Tokenizer, dense: Run, sparse: Run, selections: list[Selection]
) -> list[str]:
    """Prints answers, seconds and densities; returns what went wrong."""
    console.print(answer_table(item, tokenizer, dense.logits, sparse.logits))
    by_layer = [selection.density for selection in selections]
    density = sum(by_layer) / len(by_layer)
    right = [sum(item.right(run.logits)) for run in (dense, sparse)]
    table = Table(title="The whole call: dense against sparse")
    for name in ("attention", "answers right", "NLL, nats a token", "blocks visited", "seconds", "processor seconds"):
        table.add_column(name, justify="right")
    for name, run, good, share in zip(("dense", "sparse"), (dense, sparse), right, (1.0, density), strict=True):
        answers = f"{good} of {len(item.questions)}"
        table.add_row(name, answers, f"{item.nll(run.logits):.3f}", f"{share:.1%}", f"{run.seconds:.1f}", f"{run.processor:.1f}")
    console.print(table)
    console.print(f"by layer: {', '.join(f'{share:.1%}' for share in by_layer)} of the causal blocks", soft_wrap=True)
    return verdict(right[0], right[1], len(item.questions), density, sparse.processor / dense.processor)


def timed(model: Any, inputs: dict[str, Any]) -> Run:
    clock, processor = time.monotonic(), time.process_time()
    logits = model(**inputs).logits
    return Run(logits, time.monotonic() - clock, time.process_time() - processor)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="file to hide the facts in; without it, source of Python's standard library")
    parser.add_argument("--seed", type=int, help="names one prompt; without it, a fresh one")
    parser.add_argument("--length", type=int, default=LENGTH, help="prompt length in tokens")
    parser.add_argument("--facts", type=int, default=24, help="facts in the prompt")
    parser.add_argument("--asks", type=int, default=20, help="questions at its end")
    parser.add_argument("--config", type=Path, help="how to make it sparse; without it, sparsify.toml beside the model")
    parser.add_argument("--lower", default="eager", help="what compiles the rewritten graph; inductor compiles for longer")
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
    logging.getLogger("torch").setLevel(logging.ERROR)
    console = Console()
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 31)
    maker = code_model.maker(options.text.read_text() if options.text else None)
    item = code_prompt.prompt(maker, options.length, seed, options.facts, options.asks)
    model = code_model.load(torch.float32)
    facts = f"{options.length} tokens of code, {options.facts} facts, {len(item.questions)} questions, seed {seed}"
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {facts}", soft_wrap=True)

    inputs: dict[str, Any] = {"input_ids": item.ids, "use_cache": False, "logits_to_keep": min(options.length, item.kept + TEXT)}
    with progress.task("dense attention"):
        dense = timed(model, inputs)
    settings = {"config": str(options.config or code_model.MODEL / "sparsify.toml"), "lower": options.lower}
    looked_at = item.ids[:, :LOOKED_AT]
    with progress.task("looking at what sparsify would do"):
        plan = sparsify.explain(model, options=settings, **inputs | {"input_ids": looked_at, "logits_to_keep": 1})
    console.print(f"\nwhat sparsify does, on the first {looked_at.shape[1]} tokens:", soft_wrap=True)
    print(f"\n{plan}\n", flush=True)  # wider than a narrow terminal, so not wrapped
    sparsify.compile(model, **settings)
    with progress.task("compiling"):
        compiling = timed(model, inputs | {"input_ids": item.ids[:, :WARM_UP], "logits_to_keep": 1})
    with record_blocks() as selections, progress.task("sparse attention"):
        sparse = timed(model, inputs)
    console.print(f"compiling, in a first call of {WARM_UP} tokens: {compiling.seconds:.1f} s", soft_wrap=True)
    if len(selections) != model.config.num_hidden_layers:
        console.print(f"{len(selections)} of {model.config.num_hidden_layers} layers chose blocks: this is not the sparse model")
        return 1
    size = selections[0].block_size
    title = f"which blocks of {size} tokens attention visits: {facts}"
    picture([selection.mask() for selection in selections], options.out / "blocks.png", title, asked_facts(item, size))
    problems = report(console, item, maker.tokenizer, dense, sparse, selections)
    family, obstacle = dispatch.attention_family(torch.device("cpu"))
    if family == "reference":
        console.print(
            f"no sparse kernel here ({obstacle}): sparse attention ran as plain PyTorch, which shows its answers and not its speed"
        )
        problems = [problem for problem in problems if "processor time" not in problem]
    console.print(f"picture: {options.out / 'blocks.png'}")
    console.print(f"next: .venv/bin/sparsify cost {os.path.relpath(code_model.MODEL)} --lengths 4K..64K --device cpu", soft_wrap=True)
    for problem in problems:
        console.print(f"failed: {problem}; --seed {seed} repeats it", soft_wrap=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
