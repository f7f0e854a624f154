"""`sparsify calibrate attention` and `patterns`: a method and a setting for every head, by the user's own text and a budget."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE
from sparsify.errors import ConfigError, UnsupportedError

BESIDE = ("xattention", "sink_window")  # of patterns


def add(methods: Any) -> None:
    """Declares `attention` and `patterns`. methods: argparse's subparsers of `sparsify calibrate`."""
    _add(methods, "attention", "a method and a setting for every head, within a budget")
    patterns = _add(methods, "patterns", "minference: columns and diagonals for every head, within a budget")
    patterns.add_argument(
        "--beside",
        metavar="METHOD",
        action="append",
        choices=BESIDE,
        default=[],
        help=f"what a layer may be served by instead: {' or '.join(BESIDE)}; beside xattention's heads others keep patterns; may be given "
        "again",
    )


def _add(methods: Any, name: str, what: str) -> argparse.ArgumentParser:
    attention = methods.add_parser(name, parents=[arguments.common_options()], help=what)
    attention.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    attention.add_argument("--text", dest="prompt", metavar="FILE", required=True, help="text like the prompts to come")
    attention.add_argument("--between", metavar="TEXT", help="stands between prompts in the file: every piece is then the end of one")
    attention.add_argument(
        "--last",
        metavar="N",
        type=int,
        default=0,
        help="tokens at a piece's end, a question, that weigh as much as all others (default: 0)",
    )
    attention.add_argument(
        "--weigh",
        choices=("error", "loss"),
        help="what settings are compared by: the error of attention's outputs, or the text's loss, as gradients predict it "
        "(default: loss with --keep-loss, else error)",
    )
    budget = attention.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--keep-error", metavar="E", type=float, help="root mean square over layers of ‖o' - o‖ / ‖o‖, at most; least time within it"
    )
    budget.add_argument(
        "--keep-loss",
        metavar="X",
        type=float,
        help="mean KL divergence from dense predictions, nats a token, at most, as measured by running plans; least time within it",
    )
    budget.add_argument("--density", metavar="D", type=float, help="share of the causal blocks to visit, at most; least error within it")
    budget.add_argument("--speedup", metavar="S", type=float, help="predicted seconds of dense attention over the plan's; least error")
    attention.add_argument("--save", metavar="FILE", required=True, help="the plan file")
    attention.add_argument(
        "--measurements", metavar="FILE", help="what was measured, for going on and for other budgets (default: beside the plan)"
    )
    attention.add_argument(
        "--lengths", metavar="LENGTHS", help="tokens of the prompts that are run, as 8K,32K (default: 32K, its half, a quarter)"
    )
    attention.add_argument("--pieces", metavar="N", type=int, default=4, help="prompts of each length, at most (default: %(default)s)")
    attention.add_argument("--seed", metavar="N", type=int, default=0, help="chooses the pieces of the text (default: %(default)s)")
    attention.add_argument(
        "--at", metavar="N", type=arguments.tokens, help="length that times are predicted for (default: the longest run)"
    )
    attention.add_argument("--target", metavar="NAME", help="device that times are predicted for, as in `sparsify cost --device`")
    attention.add_argument("--max-tokens", metavar="N", type=arguments.tokens, help="only the text's first N tokens")
    attention.add_argument("--report", metavar="FOLDER", help="write heat maps, the front of error over time, and a page with both")
    attention.add_argument("--json", action="store_true", help="print the plan as JSON instead of a summary")
    attention.add_argument("--device", help="where the model runs; default: cuda where there is one")
    attention.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the model's own")
    attention.set_defaults(run=run, calibrated=name, attention="sdpa", length=None, chunk=1)
    return attention


def run(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate.attention import refine
    from sparsify.commands.calibrate.attention import run as runs
    from sparsify.commands.calibrate.attention import settings as tried
    from sparsify.commands.calibrate.attention.choose import Chooser
    from sparsify.commands.calibrate.attention.make_plan import choose_shared, make_plan
    from sparsify.commands.cost import command as cost
    from sparsify.commands.cost import device as forecast_device

    budget = _budget(given)
    weigh = _weigh(given)
    if given.pieces < 1:
        raise ConfigError(f"must be at least 1, not {given.pieces}", where="--pieces")
    wanted = None if given.lengths is None else cost.parse_lengths(given.lengths)
    save = Path(given.save)
    file = Path(given.measurements) if given.measurements else save.with_suffix(".measured.pt")
    for path in (save, file):
        if not path.parent.is_dir():
            raise UnsupportedError("there is no such folder", where=str(path.parent))
    settings, options = loading.load_config(given)
    grid = tried.pattern_grid(options, given.beside) if given.calibrated == "patterns" else tried.grid(options)
    target = target_device(given.target)
    context = forecast_device.context(target, settings.model_copy(update={"kernels": "auto"}))
    model, ids, ends = loading.load_model_and_prompts(given, given.between)
    longest = max((end - begin for begin, end in itertools.pairwise((0, *ends))), default=ids.shape[1])
    lengths = runs.lengths_for(longest, arguments.positions(model), wanted)
    if not 0 <= given.last < min(lengths):
        raise ConfigError(f"must be at least 0 and fewer than a piece's {min(lengths)} tokens, not {given.last}", where="--last")
    asked = runs.Asked(grid, lengths, given.pieces, given.seed, ends, given.last, weigh)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)
        show = lambda done, all_, what: bar.update(task, completed=done, total=all_, description=what)
        measured = runs.run(model, ids, asked, options, file=file, progress=show)
        bar.update(task, description="choosing")
        chooser = Chooser(grid, measured, target, context.family, given.at)
        played = refine.Losses(model, ids, asked, options) if weigh == "loss" else None
        if budget.kind == "keep_loss" and played is not None:
            bar.update(task, description="running plans")
            choice, note, lost = refine.keep(budget.value, lambda one: choose_shared(chooser, one, exact=False), played.lost)
            choice = dataclasses.replace(choice, budget=budget)
        else:
            choice, note = choose_shared(chooser, budget)
            lost = played and played.lost(choice)
        plan = make_plan(model, ids, options, asked, measured, chooser, choice, lost)
    try:
        plan.save(save)
    except OSError as error:
        raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    if given.report:
        from sparsify.commands.calibrate.attention import report

        report.write(Path(given.report), chooser, choice, plan)
    print(plan.to_json() if given.json else _summary(chooser, choice, measured, plan, lost))
    if note:
        print(note, file=sys.stderr if given.json else sys.stdout)
    print(f"plan: {save}; measurements, for other budgets: {file}", file=sys.stderr)
    return DONE


def _budget(given: argparse.Namespace) -> Any:
    from sparsify.commands.calibrate.attention.choose import Budget

    if given.keep_error is not None:
        if not 0 <= given.keep_error < float("inf"):
            raise ConfigError(f"must be at least 0, not {given.keep_error}", where="--keep-error")
        return Budget("keep_error", given.keep_error)
    if given.keep_loss is not None:
        if not 0 <= given.keep_loss < float("inf"):
            raise ConfigError(f"must be at least 0, not {given.keep_loss}", where="--keep-loss")
        return Budget("keep_loss", given.keep_loss)
    if given.density is not None:
        if not 0 < given.density <= 1:
            raise ConfigError(f"lies between 0 and 1, not at {given.density}", where="--density")
        return Budget("density", given.density)
    if not 1 <= given.speedup < float("inf"):
        raise ConfigError(f"must be at least 1, not {given.speedup}", where="--speedup")
    return Budget("speedup", given.speedup)


def _weigh(given: argparse.Namespace) -> Any:
    if given.keep_loss is not None and given.weigh == "error":
        raise ConfigError("settings are compared by the loss with --keep-loss", where="--weigh error", hint="--keep-error bounds the error")
    if given.keep_error is not None and given.weigh == "loss":
        raise ConfigError("settings are compared by the error with --keep-error", where="--weigh loss", hint="--keep-loss bounds the loss")
    return given.weigh or ("loss" if given.keep_loss is not None else "error")


def target_device(name: str | None) -> Any:
    """The device whose times count: the one that is named, the GPU here, or an H200 where there is none."""
    import torch

    from sparsify.commands.cost import device as forecast_device

    return forecast_device.named(name or (None if torch.cuda.is_available() else "h200"))


def _summary(chooser: Any, choice: Any, measured: Any, plan: Any, lost: float | None) -> str:
    from sparsify.commands.calibrate.attention.make_plan import describe

    lines = []
    for one in choice.layers:
        what = "dense" if one.dense else describe(one, chooser.grid)
        times = f"{one.seconds * 1e3:.3g} ms against {one.layer.seconds.dense() * 1e3:.3g}"
        lines.append(
            f"{one.layer.site.place}: {what}; density {float(one.density.mean()):.1%}, error {one.error[chooser.longest]:.4f}, {times}"
        )
    lines += [f"{place}: not calibrated: {reason}" for place, reason in measured.refused.items()]
    faster = choice.dense_seconds / choice.seconds if choice.seconds else 1.0
    errors = ", ".join(f"{choice.error(length):.4f} at {length}" for length in choice.lengths)
    times = f"{choice.seconds * 1e3:.3g} ms against {choice.dense_seconds * 1e3:.3g} ms dense ({faster:.2f} times)"
    device = choice.layers[0].layer.seconds.device.name
    lines += [
        f"error (root mean square over layers, measured): {errors}",
        *_losses(choice, lost),
        f"density {choice.density:.2%}, {times}, predicted for {choice.at} tokens on {device}; within {choice.gap:.2%} of the best choice",
        f"acts from {plan.min_length} tokens on",
    ]
    if choice.at not in choice.lengths:
        lines.append(f"densities at {choice.at} tokens are extrapolated from {', '.join(map(str, choice.lengths))}")
    return "\n".join(lines)


def _losses(choice: Any, lost: float | None) -> list[str]:
    """What the text loses, where that was asked for."""
    if lost is None:
        return []
    predicted = ", ".join(f"{choice.loss(length):.5f} at {length}" for length in choice.lengths)
    return [f"loss (nats a token): {lost:.5f} by running the plan at {choice.lengths[-1]}; predicted: {predicted}"]
