"""`sparsify explain | cost | diff | calibrate | config | methods | --version`.

Exit codes: 0 done, or the same; 1 differs, or the graph was left untouched after a failure; 2 wrong usage, configuration or model.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify import folders
from sparsify.commands import arguments
from sparsify.commands.calibrate.attention import command as attention_command
from sparsify.commands.cost import command
from sparsify.errors import ConfigError, SparsifyError, UnsupportedError

SAME, DIFFERS, FAILED = 0, 1, 2


def main(words: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(words)
    try:
        return given.run(given)
    except Exception as error:
        if given.debug:
            raise
        print(f"sparsify: {_one_line(error)}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsify", description="A torch.compile backend for sparse long context.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of sparsify, torch, triton and transformers")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="a configuration file, after sparsify.toml and SPARSIFY_CONFIG")
    common.add_argument(
        "-o", "--option", metavar="KEY=VALUE", action="append", default=[], help="one setting, such as xattention.stride=16"
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    what = model.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="FILE", help="text to run the model on; bytes become tokens where the model has no tokenizer")
    what.add_argument(
        "--length",
        metavar="N",
        type=arguments.tokens,
        help=f"run on N random tokens, as 4K (default: {arguments.LENGTH}, if they fit)",
    )
    model.add_argument("--max-tokens", metavar="N", type=arguments.tokens, help="only the prompt's first N tokens")
    model.add_argument("--device", help="default: cuda where there is one")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the model's own")
    model.add_argument("--attention", metavar="NAME", default="sdpa", help="transformers' attention implementation (default: %(default)s)")

    explain = commands.add_parser("explain", parents=[model, common], help="what sparsify would do with a model, and why")
    explain.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    explain.set_defaults(run=_explain)
    command.add(commands, common, lambda given: _load_config(given)[0])
    diff = commands.add_parser("diff", parents=[model, common], help="eager against compiled; names the first site that differs")
    diff.add_argument("--keep-all", action="store_true", help="with settings under which every lossy method must equal dense")
    diff.add_argument("--tolerance", metavar="X", type=float, help="largest relative error of the logits (default: by dtype)")
    diff.add_argument("--repro", metavar="FILE", default="sparsify_repro.py", help="script written when they differ (default: %(default)s)")
    diff.set_defaults(run=_diff)
    calibrate = commands.add_parser("calibrate", help="find values for a method on a model and text")
    what_for = calibrate.add_subparsers(metavar="METHOD", required=True)
    ffn = what_for.add_parser("ffn", parents=[common], help="ffn_skip: cold blocks, threshold and k for a share of skipped blocks")
    ffn.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    ffn.add_argument("--text", dest="prompt", metavar="FILE", required=True, help="text like the one that the model will generate")
    ffn.add_argument("--share", metavar="X", type=float, default=0.25, help="share of all blocks to skip (default: %(default)s)")
    ffn.add_argument("--warmup", metavar="N", type=arguments.tokens_or_none, default=16, help="generated tokens that stay dense")
    ffn.add_argument("--chunk", metavar="N", type=arguments.tokens, default=1024, help="tokens a piece (default: %(default)s)")
    ffn.add_argument("--max-tokens", metavar="N", type=arguments.tokens, default=32768, help="of the text (default: %(default)s)")
    ffn.add_argument("--save", metavar="FILE", help="write a plan file")
    ffn.add_argument("--plot", metavar="FILE", help="draw similarity over blocks")
    ffn.add_argument("--device", help="default: cuda where there is one")
    ffn.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the model's own")
    ffn.set_defaults(run=_calibrate_ffn, attention="sdpa", length=None)
    attention_command.add(what_for, common, _load_config, _load_model_and_tokens)
    command.add_errors(what_for, common, _load_config, _load_model_and_tokens)
    device = what_for.add_parser("device", help="ceilings and kernel efficiencies of the device here, for the cost model")
    device.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    device.add_argument("--small", action="store_true", help="few and small calls: a trial of the calibration itself")
    device.add_argument("--save", metavar="FILE", help="write the profile here instead of into the cache folder, which explain reads")
    device.add_argument("--debug", action="store_true", help="show tracebacks")
    device.set_defaults(run=_calibrate_device)
    config = commands.add_parser("config", parents=[common], help="print the configuration in effect")
    config.add_argument("--show", action="store_true", help="print the configuration in effect (this is what happens anyway)")
    config.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")
    config.set_defaults(run=_config)
    methods = commands.add_parser("methods", parents=[common], help="list the methods and their options")
    methods.set_defaults(run=_methods)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(arguments.versions())
        parser.exit()


def _one_line(error: BaseException) -> str:
    """The message of the error that torch or Python may have wrapped."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None or isinstance(cause, SparsifyError):
            break
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    if isinstance(cause, SparsifyError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''} (--debug shows the traceback)"


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """`--config` and `-o` as the mapping that `torch.compile(options=...)` takes."""
    options: dict[str, Any] = {}
    for text in given.option:
        key, equals, value = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise ConfigError("is not KEY=VALUE", where=f"-o {text}", hint="for example -o xattention.stride=16")
        table = options
        for name in names[:-1]:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name!r} has a value already", where=f"-o {text}")
        table[names[-1]] = _value(value.strip())
    if given.config is not None:
        options["config"] = given.config
    return options


def _value(text: str) -> Any:
    """A TOML value; anything that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _load_config(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from sparsify.planning import registry
    from sparsify.planning.config import config

    options = _options(given)
    return config.load(options, method_models=registry.discover()), options


def _load_model(given: argparse.Namespace) -> Any:
    import torch

    arguments.check_model(given.model)
    device = arguments.device(given.device)
    try:
        import transformers
        from torch import nn
    except ImportError:
        raise UnsupportedError("transformers is not installed", hint='pip install "sparsify-compiler[hf]"') from None
    transformers.utils.logging.disable_progress_bar()
    dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, attn_implementation=given.attention)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(f"cannot load the model: {reason[0] if reason else type(error).__name__}", where=given.model) from error
    try:
        return nn.Module.to(model, device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"cannot use device {device!r}: {str(error).splitlines()[0]}", where="--device") from error


def _load_model_and_tokens(given: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and int64 [1, tokens] on its device."""
    import torch

    data = _read(given.prompt) if given.prompt is not None else None  # before the model, which may take minutes to load
    model = _load_model(given)
    vocabulary = model.get_input_embeddings().num_embeddings
    if data is None:
        length = given.length or min(arguments.LENGTH, arguments.positions(model) or arguments.LENGTH)
        ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor(_encode(given.model, data, vocabulary), dtype=torch.int64)
    if given.max_tokens:
        ids = ids[: given.max_tokens]
    if ids.numel() == 0:
        raise UnsupportedError("the prompt has no tokens", where=given.prompt or "")
    chunk = getattr(given, "chunk", None)
    at_once, most = min(ids.numel(), chunk or ids.numel()), arguments.positions(model)
    if most is not None and at_once > most:
        flag = "--chunk" if chunk else "--length" if data is None else "--max-tokens"
        raise UnsupportedError(f"{at_once} tokens are more than the model's {most} positions", where=given.model, hint=f"{flag} {most}")
    return model, ids[None].to(model.device)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from None


def _encode(name: str, data: bytes, vocabulary: int) -> list[int]:
    if not _has_tokenizer(name):
        if max(data, default=0) >= vocabulary:
            raise UnsupportedError(
                f"the model has no tokenizer, and bytes do not fit its {vocabulary} tokens", where=name, hint="use --length"
            )
        return list(data)
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)(data.decode("utf-8", errors="replace"))["input_ids"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(f"cannot load the tokenizer: {reason[0] if reason else type(error).__name__}", where=name) from error


def _has_tokenizer(name: str) -> bool:
    folder = Path(name)
    if not folder.is_dir():
        return True  # a hub name
    return any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
    )


def _explain(given: argparse.Namespace) -> int:
    import sparsify

    _, options = _load_config(given)
    model, ids = _load_model_and_tokens(given)
    plan = sparsify.explain(model, options=options, input_ids=ids, use_cache=False)
    print(plan)
    if given.save:
        try:
            plan.save(given.save)
        except OSError as error:
            raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    return DIFFERS if plan.fallback else SAME


def _diff(given: argparse.Namespace) -> int:
    from sparsify import testing

    _, options = _load_config(given)
    if given.tolerance is not None and not given.tolerance >= 0:
        raise ConfigError(f"must be at least 0, not {given.tolerance}", where="--tolerance")
    model, ids = _load_model_and_tokens(given)
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
            return DIFFERS if whole.plan.fallback else SAME
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


def _write_repro(given: argparse.Namespace, ids: Any, culprit: Any) -> None:
    import pprint
    import textwrap

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


def _calibrate_ffn(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate import feed_forward as calibrate

    if not 0 < given.share < 1:
        raise ConfigError(f"lies between 0 and 1, not at {given.share}", where="--share")
    _, options = _load_config(given)
    model, ids = _load_model_and_tokens(given)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("similarities", total=None)
        table = calibrate.similarities(
            model, ids, chunk=given.chunk, progress=lambda done, all_: bar.update(task, completed=done, total=all_)
        )
    proposal = calibrate.propose(table, given.share)
    for block, row in enumerate(table):
        print(f"block {block:3d}  mean cosine {row.mean():.4f}  10 % below {row.quantile(0.1):.4f}")
    print(f"skips {proposal.share:.1%} of the blocks on this text; a skipped one loses a turn of {proposal.lost:.4f} (1 - cosine)")
    print("\n[ffn_skip]", *(f"{key} = {value}" for key, value in (proposal.options() | {"warmup": given.warmup}).items()), sep="\n")
    if given.plot:
        calibrate.plot(table, proposal, given.plot)
    if given.save:
        try:
            calibrate.plan_for(model, ids[:, : given.chunk], proposal, options, given.warmup, table).save(given.save)
        except OSError as error:
            raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    return SAME


def _calibrate_device(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from sparsify.commands.calibrate import device as calibrate_device
    from sparsify.costs import device as hardware
    from sparsify.costs import profile_cache

    device = arguments.device(given.device)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        show = lambda done, calls, what: bar.update(task, completed=done, total=calls, description=what)
        found = calibrate_device.calibrate(device, small=given.small, progress=show)
    print(calibrate_device.table(found))
    if given.save:
        try:
            Path(given.save).write_text(found.profile.to_json(), encoding="utf-8")
        except OSError as error:
            raise UnsupportedError(f"cannot write the profile: {error.strerror}", where=given.save) from None
        print(f"profile: {given.save}")
        return SAME
    print(f"profile: {profile_cache.store(found.profile, profile_cache.identity(device))}")
    hardware.forget()
    return SAME


def _config(given: argparse.Namespace) -> int:
    from sparsify.planning import registry
    from sparsify.planning.config import docs

    if given.markdown:
        own = {name: model for name, model in registry.discover().items() if model.__module__.startswith("sparsify.")}
        print(docs.markdown(own), end="")
    else:
        print(docs.toml(_load_config(given)[0]), end="")
    return SAME


def _methods(given: argparse.Namespace) -> int:
    import inspect

    from rich.console import Console
    from rich.table import Table

    from sparsify.planning import registry
    from sparsify.planning.config import docs

    _load_config(given)
    grid = Table(show_lines=True)
    for heading in ("method", "result", "what it does", "options"):
        grid.add_column(heading, overflow="fold")
    for name, model in sorted(registry.discover().items()):
        module = (inspect.getdoc(sys.modules[model.__module__]) or "").split("\n\n")[0].replace("\n", " ")
        grid.add_row(name, "lossy" if model.lossy else "exact", module.removeprefix(f"{name}: "), docs.option_lines(model))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(grid)
    return SAME


if __name__ == "__main__":
    sys.exit(main())
