"""`sparsify calibrate`: values for methods, measured on a model and a text (`ffn`, `attention`, `patterns`, `tokens`, `errors`), or on the
`device`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.commands.calibrate.attention import command as attention
from sparsify.commands.calibrate.tokens import command as tokens
from sparsify.commands.exit_codes import DONE
from sparsify.errors import ConfigError, UnsupportedError


def add(commands: Any) -> None:
    """Declares the command and what can be calibrated. commands: argparse's subparsers."""
    parser = commands.add_parser("calibrate", help="find values for a method on a model and text")
    methods = parser.add_subparsers(metavar="METHOD", required=True)
    for declare in (_add_ffn, attention.add, tokens.add, _add_errors, _add_device):
        declare(methods)


def _model_options() -> argparse.ArgumentParser:
    """The model and the text that both `ffn` and `errors` run, with what `sparsify.commands.loading` asks beside them."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    options.add_argument("--max-tokens", metavar="N", type=arguments.tokens, default=32768, help="of the text (default: %(default)s)")
    arguments.add_device_and_dtype(options)
    options.set_defaults(attention="sdpa", length=None)
    return options


def _add_ffn(methods: Any) -> None:
    ffn = methods.add_parser(
        "ffn",
        parents=[_model_options(), arguments.common_options()],
        help="ffn_skip: cold blocks, threshold and k for a share of skipped blocks",
    )
    ffn.add_argument("--text", dest="prompt", metavar="FILE", required=True, help="text like the one that the model will generate")
    ffn.add_argument("--share", metavar="X", type=float, default=0.25, help="share of all blocks to skip (default: %(default)s)")
    ffn.add_argument("--warmup", metavar="N", type=arguments.tokens_or_none, default=16, help="generated tokens that stay dense")
    ffn.add_argument("--chunk", metavar="N", type=arguments.tokens, default=1024, help="tokens a piece (default: %(default)s)")
    ffn.add_argument("--save", metavar="FILE", help="write a plan file")
    ffn.add_argument("--plot", metavar="FILE", help="draw similarity over blocks")
    ffn.add_argument("--json", action="store_true", help="print the values and the similarities of every block as JSON")
    ffn.set_defaults(run=run_ffn)


def run_ffn(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate import feed_forward as calibrate

    if not 0 < given.share < 1:
        raise ConfigError(f"lies between 0 and 1, not at {given.share}", where="--share")
    _, options = loading.load_config(given)
    model, ids = loading.load_model_and_tokens(given)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("similarities", total=None)
        table = calibrate.similarities(
            model, ids, chunk=given.chunk, progress=lambda done, all_: bar.update(task, completed=done, total=all_)
        )
    proposal = calibrate.propose(table, given.share)
    found = proposal.options() | {"warmup": given.warmup}
    blocks = [(float(row.mean()), float(row.quantile(0.1))) for row in table]
    if given.json:
        listed = [{"mean_cosine": mean, "tenth": tenth} for mean, tenth in blocks]
        print(json.dumps({"ffn_skip": found, "share": proposal.share, "lost": proposal.lost, "blocks": listed}, indent=1))
    else:
        for block, (mean, tenth) in enumerate(blocks):
            print(f"block {block:3d}  mean cosine {mean:.4f}  10 % below {tenth:.4f}")
        print(f"skips {proposal.share:.1%} of the blocks on this text; a skipped one loses a turn of {proposal.lost:.4f} (1 - cosine)")
        print("\n[ffn_skip]", *(f"{key} = {value}" for key, value in found.items()), sep="\n")
    if given.plot:
        calibrate.plot(table, proposal, given.plot)
    if given.save:
        try:
            calibrate.plan_for(model, ids[:, : given.chunk], proposal, options, given.warmup, table).save(given.save)
        except OSError as error:
            raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    return DONE


def _add_errors(methods: Any) -> None:
    errors = methods.add_parser(
        "errors",
        parents=[_model_options(), arguments.common_options()],
        help="how far each lossy attention method leaves the exact result, by site",
    )
    errors.add_argument("--text", dest="prompt", metavar="FILE", required=True, help="text like the prompts to come")
    errors.add_argument("--chunk", metavar="N", type=arguments.tokens, default=4096, help="tokens a prompt (default: %(default)s)")
    errors.add_argument("--save", metavar="FILE", help="write a plan file, or add to one")
    errors.add_argument("--json", action="store_true", help="print the errors at every site, and who refused, as JSON")
    errors.set_defaults(run=run_errors)


def run_errors(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate import errors as calibrate_errors
    from sparsify.planning.plan import Plan
    from sparsify.planning.provenance import check_model

    _, options = loading.load_config(given)
    before = Plan.load(given.save) if given.save and Path(given.save).exists() else None
    model, ids = loading.load_model_and_tokens(given)
    if before is not None:
        check_model(before.provenance, model, given.save)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("errors", total=None)
        show = lambda done, whole: bar.update(task, completed=done, total=whole)
        errors = calibrate_errors.measure(model, ids, options, chunk=given.chunk, progress=show)
    print(json.dumps(calibrate_errors.data(errors), indent=1) if given.json else calibrate_errors.table(errors))
    if given.save:
        plan = calibrate_errors.plan_for(model, ids[:, : given.chunk], options, errors, before)
        try:
            plan.save(given.save)
        except OSError as error:
            raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    return DONE


def _add_device(methods: Any) -> None:
    device = methods.add_parser("device", help="ceilings and kernel efficiencies of the device here, for the cost model")
    device.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    device.add_argument("--small", action="store_true", help="few and small calls: a trial of the calibration itself")
    device.add_argument("--save", metavar="FILE", help="write the profile here instead of into the cache folder, which explain reads")
    device.add_argument("--json", action="store_true", help="print the profile as JSON instead of a table")
    device.add_argument("--debug", action="store_true", help="show tracebacks")
    device.set_defaults(run=run_device)


def run_device(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate import device as calibrate_device
    from sparsify.commands.calibrate import links
    from sparsify.costs import device as hardware
    from sparsify.costs import profile_cache

    device = arguments.device(given.device)
    between = None
    with links.started(device) as processes:
        if processes > 1:
            between = links.measure(device, small=given.small)
            if not links.is_first():  # which measures the rest
                return DONE
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        show = lambda done, calls, what: bar.update(task, completed=done, total=calls, description=what)
        found = calibrate_device.calibrate(device, small=given.small, progress=show, links=between)
    print(found.profile.to_json() if given.json else calibrate_device.table(found))
    told = sys.stderr if given.json else sys.stdout
    if given.save:
        try:
            Path(given.save).write_text(found.profile.to_json(), encoding="utf-8")
        except OSError as error:
            raise UnsupportedError(f"cannot write the profile: {error.strerror}", where=given.save) from None
        print(f"profile: {given.save}", file=told)
        return DONE
    print(f"profile: {profile_cache.store(found.profile, profile_cache.identity(device))}", file=told)
    hardware.forget()
    return DONE
