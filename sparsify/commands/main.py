"""`sparsify explain | cost | diff | bench | eval | calibrate | doctor | config | methods`; a command declares its own arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from sparsify.commands import arguments, completion, diff, doctor, explain, listings
from sparsify.commands.bench import command as bench
from sparsify.commands.calibrate import command as calibrate
from sparsify.commands.cost import command as cost
from sparsify.commands.eval import command as evaluate
from sparsify.commands.exit_codes import DONE, FAILED, INTERRUPTED
from sparsify.errors import SparsifyError


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, one of `exit_codes`. words: of the command line; None: the process's own."""
    given = _parser().parse_args(words)
    try:
        code = given.run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `sparsify explain … | head`: who reads has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return DONE
    except KeyboardInterrupt:
        if given.debug:
            raise
        print("sparsify: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if given.debug:
            raise
        print(f"sparsify: {_one_line(error)}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsify", description="A torch.compile backend for sparse long context.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of sparsify, torch, triton and transformers")
    completion.add(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (explain, cost, diff, bench, evaluate, calibrate, doctor, listings):
        command.add(commands)
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


if __name__ == "__main__":
    sys.exit(main())
