"""Random attention programs: what sparsify makes of them equals eager, or the site is refused; never wrong, never a crash.

    python -m tests.fuzz.run --examples 10000 --seed 0 --jobs 8 --record

Programs are drawn in chunks that depend on the seed alone, so the number of processes changes nothing. A failure ends its chunk; it is
shrunk, and a script that shows it without these tests is written and printed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import torch

from benchmarks.lib import records
from benchmarks.test_runs import Fuzz
from tests.fuzz.check import BOUND, METHODS, STRICT, Invalid, Slack, Tally, check
from tests.fuzz.graphs import Program, programs

FOLDER = Path("build/fuzz")
CHUNK = 50  # programs
SHRINK_S = 30.0  # longest time that a failure is made smaller for


@dataclass
class Failure:
    """The smallest program that failed, its error, and the script that shows it."""

    program: Program
    error: Exception
    script: Path

    @property
    def kind(self) -> str:
        """The error without its numbers and names."""
        text = f"{type(self.error).__name__}: {self.error}".splitlines()[0]
        return re.sub(r"\b[a-z_]+_\d+\b|-?\d[\d.e+-]*", "#", text)[:160]


def fuzz(
    examples: int, seed: int, folder: Path = FOLDER, say: Callable[[str], None] = print, checker: Callable[..., None] = check
) -> tuple[Tally, Failure | None]:
    """Checks that many random programs; stops at the first that fails, shrinks it and writes its script into `folder`."""
    tally, last, stop = Tally(), [], [0.0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def one(program: Program) -> None:
        if last and time.perf_counter() > stop[0]:
            return  # hypothesis then says that the failure is flaky; the smallest so far is kept
        try:
            checker(program, Tally() if last else tally)
        except Invalid:
            hypothesis.reject()
        except Exception as error:
            stop[0] = stop[0] or time.perf_counter() + SHRINK_S
            if not last or type(error) is type(last[0][1]):
                last[:] = [(program, error)]
            raise
        if tally.programs % 500 == 0 and not last:
            say(str(tally))

    try:
        with _quiet():
            one()
    except Exception:
        if not last:
            raise
        program, error = last[0]
        return tally, Failure(program, error, write_script(program, error, folder))
    finally:
        torch._dynamo.reset()
    return tally, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """hypothesis prints the example itself; the script is what people need."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def write_script(program: Program, error: Exception, folder: Path) -> Path:
    """A script that needs torch and sparsify alone, and exits with 1 while the failure is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"repro_{hashlib.sha256(program.source.encode()).hexdigest()[:12]}.py"
    summary = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace('"""', "'''")
    bounds = {dtype: Slack.of(program)(dtype) for dtype in BOUND}
    path.write_text(_SCRIPT.format(summary=summary, source=program.source, methods=METHODS, strict=STRICT, bound=bounds))
    return path.absolute()


_SCRIPT = '''\
"""{summary}"""

import sys

{source}

METHODS = {methods}
STRICT = {strict}
BOUND = {bound}


def everything(found, arguments):
    """Results, arguments, and the gradients of those that need one."""
    results = [r for r in (found if isinstance(found, tuple) else (found,)) if isinstance(r, torch.Tensor)]
    needing = [r for r in results if r.requires_grad]
    needed = [a for a in arguments.values() if a.requires_grad and a.is_leaf]
    gradients = torch.autograd.grad(needing, needed, [torch.ones_like(r) for r in needing], allow_unused=True) if needing and needed else []
    flags = torch.tensor([r.requires_grad for r in results])
    return [*results, flags, *arguments.values(), *(g if g is not None else torch.tensor(torch.nan) for g in gradients)]


def main() -> int:
    wrong = 0
    with around():
        print("rows that see a key:", visible(inputs()).tolist())
        arguments = inputs()
        want = everything(program(**arguments), arguments)
        for name, options in METHODS.items():
            torch._dynamo.reset()
            arguments = mark(inputs())
            compiled = torch.compile(program, backend="sparsify", options=STRICT | options, fullgraph=True)
            got = everything(compiled(**arguments), arguments)
            if len(got) != len(want):
                wrong = 1
                print(f"{{name}}: {{len(got)}} tensors, not {{len(want)}}")
            for place, (a, b) in enumerate(zip(got, want)):
                a, b, dtype = a.double(), b.double(), b.dtype
                error = (a - b).abs().masked_fill(a.isnan() & b.isnan(), 0.0).nan_to_num(torch.inf).max().item() if b.numel() else 0.0
                bound = BOUND.get(dtype, 0.0) * max(1.0, b.nan_to_num(0.0).abs().max().item() if b.numel() else 0.0)
                if error > bound:
                    wrong = 1
                    print(f"{{name}}: tensor {{place}} differs by {{error:.2e}}, {{bound:.0e}} is allowed")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
'''


# -- many ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    examples: int
    seed: int
    folder: Path
    every_row: bool


def run_chunk(chunk: Chunk) -> tuple[Tally, dict[str, str] | None]:
    """In a process of its own; what is wrong comes back as text."""
    torch.set_num_threads(1)

    def checker(program: Program, tally: Tally) -> None:
        check(program, tally, every_row=chunk.every_row)

    tally, failure = fuzz(chunk.examples, chunk.seed, chunk.folder, say=lambda text: None, checker=checker)
    if failure is None:
        return tally, None
    error = f"{type(failure.error).__name__}: {failure.error}".splitlines()[0][:400]
    return tally, {"kind": failure.kind, "error": error, "script": str(failure.script), "source": failure.program.source}


def run_chunks(chunks: list[Chunk], jobs: int) -> Iterator[tuple[Tally, dict[str, str] | None]]:
    if jobs == 1:
        yield from map(run_chunk, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run_chunk, chunks)


def summary(tally: Tally, wrong: list[dict[str, str]]) -> str:
    lines = [str(tally), "  around: " + ", ".join(f"{kind} {count}" for kind, count in tally.kinds.most_common())]
    lines += [f"  left as is {count:5d}: {reason}" for reason, count in tally.reasons.most_common(25)]
    lines += [f"  not run    {count:5d}: {reason}" for reason, count in tally.invalid.most_common(8)]
    lines.append(f"  wrong      {len(wrong):5d}")
    kinds = collections.Counter(one["kind"] for one in wrong)
    for kind, count in kinds.most_common():
        smallest = min((one for one in wrong if one["kind"] == kind), key=lambda one: len(one["source"]))
        lines += ["", f"{count} x {smallest['error']}", f"repro: {smallest['script']}", smallest["source"]]
    return "\n".join(lines)


def too_few(tally: Tally) -> str:
    """The reason for which more programs were not run than ran: an environment's, which leaves one kind of them. Empty without one."""
    return next((reason for reason, count in tally.invalid.most_common(1) if count > tally.programs), "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="programs to check (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same programs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the scripts of failures (default: %(default)s)")
    parser.add_argument("--record", type=Path, nargs="?", const=records.RESULTS / "fuzz.jsonl", help="append a record (default: %(const)s)")
    parser.add_argument("--skip-empty-rows", action="store_true", help="do not compare rows that see no key")
    given = parser.parse_args(arguments)
    begin = time.perf_counter()
    sizes = [min(CHUNK, given.examples - first) for first in range(0, given.examples, CHUNK)]
    chunks = [Chunk(size, given.seed * 1_000_003 + n, given.out, not given.skip_empty_rows) for n, size in enumerate(sizes)]
    tally, wrong = Tally(), []
    for n, (part, failure) in enumerate(run_chunks(chunks, given.jobs), 1):
        tally.join(part)
        if failure is not None:
            wrong.append(failure)
            print(f"{failure['error']}\n  repro: {failure['script']}", flush=True)
        if n % 20 == 0:
            print(tally, flush=True)
    seconds = time.perf_counter() - begin
    print(summary(tally, wrong), f"{seconds:.0f} s", sep="\n")
    if found := too_few(tally):
        print(f"more programs than ran were not run for one reason, so that this says little: {found}")
        return 2
    if given.record is not None:
        counts = {name: dict(v.most_common(100)) if isinstance(v, collections.Counter) else v for name, v in vars(tally).items()}
        asked = {"examples": given.examples, "seed": given.seed, "jobs": given.jobs, "every_row": not given.skip_empty_rows}
        records.append(given.record, Fuzz(seconds=round(seconds), wrong=wrong, more=asked | counts))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
