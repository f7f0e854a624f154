"""`sparsify eval`: what sparse attention does to a model's answers, task by task, beside dense attention on the same questions."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from sparsify import folders
from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE, FAILED
from sparsify.errors import ConfigError, UnsupportedError

RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")  # those that need no network
_MANY = 16  # lengths


def add(commands: Any) -> None:
    """The command's arguments."""
    own = commands.add_parser(
        "eval", parents=[arguments.common_options()], help="answers under sparse attention, task by task, beside dense"
    )
    own.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    own.add_argument(
        "--setting",
        metavar="S",
        action="append",
        default=[],
        help="what to compare with dense attention: default, eager, tau=0.9, density=0.1, NAME=FILE (options as JSON, a plan, or TOML), "
        "NAME:KEY=VALUE,KEY=VALUE; may be repeated (default: default)",
    )
    own.add_argument(
        "--cache",
        metavar="POLICY:BUDGET",
        action="append",
        default=[],
        help="also a SparseCache under exact attention, such as snapkv:512 or snapkv:0.25:kernel=15, with the question inside and outside "
        "of what it compresses; may be repeated",
    )
    own.add_argument(
        "--tasks",
        metavar="NAMES",
        help="lm-evaluation-harness tasks, `ruler` (its six that need no network), `needles` (byte-level models), with commas "
        "(default: ruler, or needles where the model has no tokenizer)",
    )
    own.add_argument("--lengths", metavar="LIST", default="4K", help="tokens of a prompt, such as 2K,4K,8K (default: %(default)s)")
    own.add_argument(
        "--samples", metavar="N", type=arguments.tokens, default=100, help="questions a task and length (default: %(default)s)"
    )
    own.add_argument("--batch", metavar="N", type=arguments.tokens, default=1, help="questions at once (default: %(default)s)")
    own.add_argument("--text", metavar="FILE", help="text to measure the negative log-likelihood of, and to hide byte-level needles in")
    own.add_argument("--windows", metavar="N", type=arguments.tokens, default=8, help="of the text, a length (default: %(default)s)")
    own.add_argument("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    own.add_argument("--json", metavar="FILE", help="write all scores and where they come from, after each task anew")
    own.add_argument("--plot", metavar="FILE", help="draw needles over depth and length")
    arguments.add_device_and_dtype(own)
    own.add_argument("--attention", metavar="NAME", default="sdpa", help="transformers' attention implementation (default: %(default)s)")
    own.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sparsify.commands.eval import report, settings
    from sparsify.commands.eval import run as running

    chosen = settings.all_of(given.setting, given.cache)
    _, common = loading.load_config(given)
    _check_options(chosen, common)
    lengths = parse_lengths(given.lengths)
    arguments.check_model(given.model)
    tokenizer = loading.has_tokenizer(given.model)
    names, forms = split_tasks(given.tasks or ("ruler" if tokenizer else "needles"))
    _check_tasks(names, forms, tokenizer, given.text)
    text = loading.read(given.text) if given.text else None
    if given.json or given.plot:
        _check_writable(given.json, given.plot)
    model = loading.load_model(given)
    tasks = _tasks(given, model, tokenizer, lengths, names, forms, text)
    chosen = sorted(chosen, key=lambda one: one.options is not None)  # uncompiled first: what was compiled stays so
    facts = _facts(given, model, chosen, lengths)
    cells: list[Any] = []
    finished, questions = 0, sum(map(len, tasks))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)  # this stream, whatever the harness's own is led to
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        line = bar.add_task("", total=len(chosen) * questions)
        for setting in chosen:
            bar.update(line, description=f"{setting.name} · compiling")
            running.prepare(model, setting, common)
            run_ = running.Run(model, setting, given.batch, lambda count: bar.advance(line, count))
            for task in tasks:
                bar.update(line, description=f"{setting.name} · {task.name} · {report.size(task.length)}")
                cells += running.ask(run_, task, given.debug)
                finished += len(task)
                bar.update(line, completed=finished)
                if given.json:
                    _write(given.json, report.data(cells, facts))
    print(report.table(cells, None if sys.stdout.isatty() else 160))
    if given.plot:
        report.plot(cells, given.plot)
    return FAILED if any(cell.error for cell in cells) else DONE


def parse_lengths(text: str) -> list[int]:
    """`2K,4K` as tokens, each once and in order of size. Raises ConfigError for anything else."""
    found = {arguments.count(piece) for piece in text.split(",")}
    if None in found or 0 in found or len(found) > _MANY:
        raise ConfigError(f"{text!r} is no list of lengths", where="--lengths", hint="for example 2K,4K,8K")
    return sorted(length for length in found if length)


def split_tasks(text: str) -> tuple[list[str], list[str]]:
    """The harness's tasks and the forms of byte-level needles that are named: `ruler` stands for six tasks, `needles` for all forms.

    Raises:
        ConfigError: nothing is named, or a form that does not exist.
    """
    from sparsify.commands.eval.needles import FORMS
    from sparsify.errors import nearest

    names: list[str] = []
    forms: list[str] = []
    for name in (piece.strip() for piece in text.split(",")):
        if name == "needles":
            forms += FORMS
        elif name.startswith("needles_"):
            form = name.removeprefix("needles_")
            if form not in FORMS:
                raise ConfigError(f"unknown form {form!r}", where=f"--tasks {name}", hint=nearest(form, FORMS))
            forms.append(form)
        elif name:
            names += RULER if name == "ruler" else [name]
    if not names and not forms:
        raise ConfigError("names no task", where="--tasks")
    return list(dict.fromkeys(names)), list(dict.fromkeys(forms))


def _check_options(chosen: list[Any], common: dict[str, Any]) -> None:
    """Raises ConfigError or PlanError now, not after an hour."""
    from sparsify.commands.eval.settings import merged
    from sparsify.planning import registry
    from sparsify.planning.config import config
    from sparsify.planning.saved_plan import load_saved_plan

    models = registry.discover()
    for setting in chosen:
        if setting.options is not None:
            load_saved_plan(config.load(merged(common, setting), method_models=models).plan)
        if setting.cache is not None:
            from sparsify import policies

            policies.make(setting.cache.policy, **dict(setting.cache.options))


def _check_tasks(names: list[str], forms: list[str], tokenizer: bool, text: str | None) -> None:
    if names and not tokenizer:
        raise UnsupportedError("the model has no tokenizer", where=f"--tasks {names[0]}", hint="--tasks needles, if its tokens are bytes")
    if forms and tokenizer:
        raise UnsupportedError("needles are for models whose tokens are bytes", where="--tasks needles", hint="--tasks ruler")
    if forms and text is None:
        raise ConfigError("needles need a text to be hidden in", where="--tasks needles", hint="--text FILE")
    missing = [name for name in ("lm_eval", "wonderwords", "nltk") if importlib.util.find_spec(name) is None]
    if names and missing:
        what = f"{missing[0]} is not installed: lm-evaluation-harness runs these tasks"
        raise UnsupportedError(what, where=f"--tasks {names[0]}", hint='pip install "sparsify-compiler[eval]"')


def _tasks(
    given: argparse.Namespace, model: Any, tokenizer: bool, lengths: list[int], names: list[str], forms: list[str], text: bytes | None
) -> list[Any]:
    """Everything to ask, in order of name and length."""
    import torch

    from sparsify.commands.eval.byte_tasks import Needles
    from sparsify.commands.eval.text import TextNll

    most = arguments.positions(model)
    if most is not None and lengths[-1] > most:
        raise UnsupportedError(f"{lengths[-1]} tokens are more than the model's {most} positions", where="--lengths", hint=str(most))
    found: list[Any] = []
    ids = None
    if tokenizer:
        import transformers

        encoder = transformers.AutoTokenizer.from_pretrained(given.model)
        if names:
            from sparsify.commands.eval import harness

            at_most = most or lengths[-1] + 1024
            sets = [harness.load(names, n, encoder, given.model, given.samples, at_most, given.chat) for n in lengths]
            found = [one for tasks in zip(*sets, strict=True) for one in _once(tasks)]
        if text is not None:
            ids = torch.tensor(encoder(text.decode("utf-8", errors="replace"))["input_ids"])
    elif text is not None:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        if int(ids.max()) >= model.get_input_embeddings().num_embeddings:
            raise UnsupportedError("the model has no tokenizer, and bytes do not fit its tokens", where=given.model)
        kinds = [(form, turns) for form in forms for turns in (False, True)]
        found = [Needles(form, n, text, given.samples, turns=turns) for form, turns in kinds for n in lengths]
    if ids is not None:
        found += [TextNll(ids, length, given.windows) for length in lengths]
    return found


def _once(tasks: tuple[Any, ...]) -> tuple[Any, ...]:
    """One task at several lengths; only the first where its data have none."""
    return tasks if tasks[0].length is not None else tasks[:1]


def _facts(given: argparse.Namespace, model: Any, chosen: list[Any], lengths: list[int]) -> dict[str, Any]:
    import datetime

    from sparsify.commands import provenance
    from sparsify.planning.provenance import model_digest

    folder = Path(given.model).expanduser()
    names = ("lm_eval", "datasets", "tokenizers")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": folder.name if folder.is_dir() else given.model,
        "model_digest": model_digest(model),
        "model_sha256": provenance.sha256(folder) if folder.is_dir() else None,
        "text_sha256": provenance.sha256(Path(given.text)) if given.text else None,
        "machine": provenance.machine() | {name: provenance.version(name) for name in names},
        "settings": [setting.data() for setting in chosen],
        "lengths": lengths,
        "samples": given.samples,
        "batch": given.batch,
        "dtype": given.dtype,
        "chat": given.chat,
    }


def _check_writable(*paths: str | None) -> None:
    for path in paths:
        if path and not Path(path).absolute().parent.is_dir():
            raise UnsupportedError("cannot be written: there is no such folder", where=path)


def _write(path: str, data: dict[str, Any]) -> None:
    try:
        folders.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), Path(path))
    except OSError as error:
        raise UnsupportedError(f"cannot be written: {error.strerror}", where=path) from None
