"""`sparsify calibrate tokens`: behind which layer few tokens of a prompt can go on, which heads choose them, and how many."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE
from sparsify.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from sparsify.commands.calibrate.tokens.search import Point, Search


def add(methods: Any) -> None:
    """Declares the command. methods: argparse's subparsers of `sparsify calibrate`."""
    help = "token_select: the layer, its heads and the tokens that keep the answers"
    tokens = methods.add_parser("tokens", parents=[arguments.common_options()], help=help)
    tokens.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    tokens.add_argument("--text", dest="prompt", metavar="FILE", required=True, help="text like the prompts to come")
    tokens.add_argument(
        "--keep-error",
        metavar="E",
        type=float,
        required=True,
        help="nats that an answer's token may lose; least time within it",
    )
    tokens.add_argument("--save", metavar="FILE", required=True, help="the plan file")
    tokens.add_argument(
        "--prompt-length", metavar="N", type=arguments.tokens, default=8192, help="tokens of the prompts that are run (default: 8K)"
    )
    tokens.add_argument("--keep", metavar="LENGTHS", help="tokens that go on, as 512,1K (default: 1/32, 1/16, 1/8 and 1/4 of the prompt)")
    tokens.add_argument(
        "--pieces", metavar="N", type=int, default=4, help="of the text; each gives two prompts, at most (default: %(default)s)"
    )
    tokens.add_argument("--cue", metavar="N", type=arguments.tokens, default=48, help="of a passage that a prompt repeats (default: 48)")
    tokens.add_argument("--answer", metavar="N", type=arguments.tokens, default=32, help="tokens after a prompt (default: 32)")
    tokens.add_argument("--seed", metavar="N", type=int, default=0, help="chooses pieces and passages (default: %(default)s)")
    tokens.add_argument("--at", metavar="N", type=arguments.tokens, help="length that times are predicted for (default: --prompt-length)")
    tokens.add_argument("--target", metavar="NAME", help="device that times are predicted for, as in `sparsify cost --device`")
    tokens.add_argument("--max-tokens", metavar="N", type=arguments.tokens, help="only the text's first N tokens")
    tokens.add_argument("--json", action="store_true", help="print what was run as JSON instead of a table")
    arguments.add_device_and_dtype(tokens)
    tokens.set_defaults(run=run, attention="sdpa", length=None, chunk=1)


def run(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate.attention.command import target_device
    from sparsify.commands.calibrate.tokens import search as searching
    from sparsify.passes.token_select import TokenSelect
    from sparsify.planning.config import config

    if given.pieces < 1:
        raise ConfigError(f"must be at least 1, not {given.pieces}", where="--pieces")
    if not 0 <= given.keep_error < float("inf"):
        raise ConfigError(f"must be at least 0, not {given.keep_error}", where="--keep-error")
    if not Path(given.save).parent.is_dir():
        raise UnsupportedError("there is no such folder", where=str(Path(given.save).parent))
    length = given.prompt_length
    settings, given_options = loading.load_config(given)
    options: dict[str, Any] = {**given_options, "passes": list(settings.passes)}
    method = config.validate(TokenSelect, options.get("token_select", {}), "options", "token_select")
    keeps = _keeps(given, method)
    if method.mode != "narrow":
        raise ConfigError(
            "answers are measured over the narrowed prompt alone", where="token_select.mode", hint="leave it out, and set it in the plan"
        )
    target = target_device(given.target)
    model, ids = loading.load_model_and_tokens(given)
    _check_positions(model, given)
    asked = searching.Asked(method, length, keeps, given.pieces, given.cue, given.answer, given.seed, given.keep_error)
    at = given.at or length
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)
        show = lambda done, all_, what: bar.update(task, completed=done, total=all_, description=what)
        search = searching.Search(model, ids, asked, options, predictor(model, given.model, settings, target, at), show)
        point = search.run()
        bar.update(task, completed=1, total=1, description="measured")
        plan = searching.make_plan(search, point, at, target.name)
    try:
        plan.save(given.save)
    except OSError as error:
        raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    if given.json:
        print(json.dumps({"chosen": _data(point), "points": [_data(one) for one in search.points]}, indent=1))
    else:
        print(_table(search, point, at, target.name))
    return DONE


def _keeps(given: argparse.Namespace, method: Any) -> tuple[int, ...]:
    """Numbers of tokens to try, rising. Raises ConfigError for impossible ones."""
    from sparsify.commands.cost import command as cost

    length, fixed = given.prompt_length, method.sinks + method.window
    if given.keep is not None:
        keeps = sorted(set(cost.parse_lengths(given.keep)))
        wrong = [keep for keep in keeps if not fixed < keep < length]
    else:
        keeps = [length // part for part in (32, 16, 8, 4) if length // part > fixed]
        wrong = [] if keeps else [length // 4]
    if wrong:
        what = f"{wrong[0]} of {length} tokens, of which {method.sinks} sinks and a window of {method.window} go on anyway"
        raise ConfigError(what, where="--keep")
    return tuple(keeps)


def _check_positions(model: Any, given: argparse.Namespace) -> None:
    most, needed = arguments.positions(model), given.prompt_length + given.answer
    if most is not None and needed > most:
        what = f"a prompt and its answer of {needed} tokens are more than the model's {most} positions"
        raise UnsupportedError(what, where=given.model, hint=f"--prompt-length {most - given.answer}")


def predictor(model: Any, name: str, settings: Any, target: Any, at: int) -> Any:
    """Seconds of a whole prompt of `at` tokens on a device with a method, and without it: what `sparsify cost` forecasts."""
    from sparsify.commands.cost import device as forecast_device
    from sparsify.commands.cost import forecaster, meta_model

    meta = meta_model.build(name, config=model.config, dtype=next(model.parameters()).dtype)
    context = forecast_device.context(target, settings.model_copy(update={"kernels": "auto"}))

    def predict(method: Any) -> tuple[float, float]:
        others = tuple(one for one in settings.passes if one != "token_select")
        methods = {**settings.methods, "token_select": method.options()}
        chosen = settings.model_copy(update={"passes": ("token_select", *others), "methods": methods, "plan": None})
        row = forecaster.Forecaster(meta, chosen, context).forecast((at,)).rows[0]
        return row.chosen.prefill.total, row.dense.prefill.total

    return predict


def _data(point: Point) -> dict[str, Any]:
    return {
        **{name: getattr(point.method, name) for name in ("layer", "heads", "keep")},
        "losses": {kind: vars(loss) for kind, loss in point.losses.items()},
        "held": point.held,
        "seconds": point.seconds,
        "dense_seconds": point.dense_seconds,
    }


def _table(search: Search, chosen: Point, at: int, target: str) -> str:
    from sparsify.commands.calibrate.tokens.pieces import KINDS

    lines = []
    for point in sorted(search.points, key=lambda one: (one.seconds, one.loss)):
        lost = "; ".join(
            f"{kind} {point.losses[kind].nll:+.4f} ± {point.losses[kind].error:.4f} nats, {point.losses[kind].agree:.0%} as dense"
            for kind in KINDS
        )
        mark = "*" if point is chosen else " "
        lines.append(f"{mark} {point.describe()}: {lost}; {point.seconds * 1e3:.3g} ms against {point.dense_seconds * 1e3:.3g}")
    lines.append(f"* takes the least time within {search.asked.budget} nats; predicted for a prompt of {at} tokens on {target}")
    if chosen.seconds >= chosen.dense_seconds:
        lines.append("nothing is saved at that length: predict for a longer one with --at, or another device with --target")
    return "\n".join(lines)
