"""`sparsify --print-completion SHELL`: what a shell needs to complete the command's words."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

SHELLS = ("bash", "zsh", "tcsh", "fish")
_FILES = {"FILE"}  # what arguments are called that name files
_FOLDERS = {"FOLDER", "MODEL"}


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the option."""
    parser.add_argument("--print-completion", action=_Completion, choices=SHELLS, help="print completions for a shell, to be sourced by it")


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None, *_: Any) -> None:
        if values == "fish":
            print("\n".join(_fish(parser)))
            parser.exit()
        try:
            import shtab  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError:
            parser.error('shtab is not installed (pip install "sparsify-compiler[completion]")')
        for action in _actions(parser):
            names = {action.metavar}
            if names & (_FILES | _FOLDERS):
                setattr(action, "complete", shtab.FILE if names & _FILES else shtab.DIRECTORY)  # noqa: B010  (shtab's own attribute)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A line for each word that fish can complete, which shtab does not write for."""
    yield f"complete -c {parser.prog} -f"
    for path, command in _commands(parser):
        deeper = [name for action in command._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices]
        seen = [f"__fish_seen_subcommand_from {name}" for name in path]
        unseen = [f"not __fish_seen_subcommand_from {' '.join(deeper)}"] if deeper else []
        where = "; and ".join([*seen, *unseen])
        for action in command._actions:
            yield from (f"complete -c {parser.prog} -n {shlex.quote(where)} {words}" for words in _fish_words(action))


def _fish_words(action: argparse.Action) -> Iterator[str]:
    """An argument as options of fish's `complete`."""
    if isinstance(action, argparse._SubParsersAction):
        for one in action._choices_actions:
            yield f"-a {one.dest} {_fish_help(one)}"
        return
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in action.option_strings)
    if action.metavar in _FILES:
        values = "-F"
    elif action.metavar in _FOLDERS:
        values = "-a '(__fish_complete_directories)'"
    else:
        values = f"-a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
    if not names and not values:
        return
    takes = "-r" if names and action.nargs != 0 else ""  # a value, which an option must have
    yield " ".join(filter(None, (names, takes, values, _fish_help(action))))


def _fish_help(action: argparse.Action) -> str:
    told = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return f"-d {shlex.quote(told)}" if told else ""


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """A parser and those of its commands, with the words that lead to them."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _commands(command, (*path, name))
