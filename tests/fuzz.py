"""Random attention graphs: what sparsify makes of them equals eager, or the site is refused; never wrong, never a crash.

    python -m tests.fuzz --examples 10000 --seed 0

A failure is shrunk, and a script that shows it without these tests is written and named.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from torch import fx

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import config, method, pipeline
from sparsify.eager_ops import is_softmax
from sparsify.match import is_sdpa
from sparsify.plan import Plan
from sparsify.trace import Trace
from tests.fuzz_graphs import Program, programs

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention"], "xattention": {"threshold": 1.0, "block": 64}},
    "sink_window": {"passes": ["sink_window"], "sink_window": {"sinks": 2, "window": 1 << 20}},
}
STRICT = {"strict": True, "lower": "eager", "min_length": 0}
# largest difference allowed, relative to the largest value of the output: two roundings of scores of up to about ten
BOUND = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FOLDER = Path("build/fuzz")


class Wrong(AssertionError):
    """A rewritten program gave another result."""


@dataclass
class Tally:
    """What happened to the sites seen so far, by method."""

    programs: int = 0
    sites: int = 0
    rewritten: collections.Counter = field(default_factory=collections.Counter)
    reasons: collections.Counter = field(default_factory=collections.Counter)

    def add(self, name: str, plan: Plan) -> None:
        self.rewritten[name] += len(plan.rewritten)
        if name == "dense":
            self.sites += len(plan.decisions)
            self.reasons.update(d.reason for d in plan.decisions if d.method is None)

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {count}" for name, count in sorted(self.rewritten.items()))
        return f"{self.programs} programs, {self.sites} sites; rewritten by {shares}"


def check(program: Program, tally: Tally | None = None, methods: dict[str, dict[str, Any]] = METHODS) -> None:
    """Captures the program's graph once and runs it as it is and as each method rewrites it, on equal inputs.

    Raises:
        Wrong: a result or a side effect differs, or a call of scaled_dot_product_attention is missing from the plan.
        Exception: whatever the compiler raised under `strict`.
    """
    tally = tally or Tally()
    names = program.load()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rows = names["visible"](names["inputs"]())
            names["program"](**names["inputs"]())
        except (RuntimeError, IndexError) as error:
            raise Invalid(str(error)) from error
        graph = _captured(names["program"], names["mark"](names["inputs"]()))
        want = graph.run(graph.module.forward)
        tally.programs += 1
        for name, options in methods.items():
            settings = config.load({**STRICT, **options}, method_models=method.discover(), environ={})
            plan, rewritten, _ = pipeline.rewrite_graph(pipeline.copy_graph(graph.module), settings, Trace(None))
            tally.add(name, plan)
            if len(plan.decisions) < program.sdpa:
                raise Wrong(f"{program.sdpa} attentions, {len(plan.decisions)} in the plan")
            if rewritten is not None:
                if len(plan.rewritten) == len(plan.decisions) and name != "dense":
                    _alone(rewritten, name)
                compare(graph.run(rewritten.forward), want, rows, name)


def _alone(rewritten: fx.GraphModule, name: str) -> None:
    """Where every attention was replaced none is left: keep-all settings would not show an old one that is still read."""
    left = [n.name for n in rewritten.graph.nodes if is_sdpa(n) or is_softmax(n)]
    if left:
        raise Wrong(f"{name}: {left[0]} is still computed")


class Invalid(Exception):
    """A program that PyTorch itself does not run."""


@dataclass
class Captured:
    """A Dynamo graph with the arguments of its first call, which every run gets copies of."""

    module: fx.GraphModule
    arguments: tuple[Any, ...]

    def run(self, forward: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
        """Results, and the arguments afterwards."""
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in self.arguments]
        return list(forward(*arguments)), arguments


def _captured(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Captured:
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def first_call(*arguments: Any) -> Any:
            found.append(Captured(gm, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)))
            return gm.forward(*arguments)

        return first_call

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(**inputs)
    (graph,) = found
    return graph


def compare(got: tuple[list, list], want: tuple[list, list], rows: torch.Tensor, name: str) -> None:
    """Results and arguments after the call, tensor by tensor.

    Rows that see no key are left out of 4-D results, whatever their layout; where eager's own value is not finite, anything goes.

    Raises:
        Wrong: naming the first tensor that differs.
    """
    for kind, ours, theirs in (("result", got[0], want[0]), ("argument", got[1], want[1])):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(b, torch.Tensor):
                continue
            if a.shape != b.shape or a.dtype != b.dtype or _strides(a) != _strides(b):
                raise Wrong(
                    f"{name}: {kind} {place} is {a.dtype} {tuple(a.shape)}, strides {a.stride()}; {b.dtype} {tuple(b.shape)}, {b.stride()}"
                )
            if not b.is_floating_point():
                if not torch.equal(a, b):
                    raise Wrong(f"{name}: {kind} {place} differs")
                continue
            counted = b.isfinite() & _counted(b, rows)
            bound = BOUND[b.dtype] * max(1.0, b[counted].abs().max().item() if counted.any() else 0.0)
            error = (a - b).abs().nan_to_num(torch.inf)[counted].max().item() if counted.any() else 0.0
            if error > bound:
                raise Wrong(f"{name}: {kind} {place} differs by {error:.2e}; {bound:.0e} is allowed")


def _strides(tensor: torch.Tensor) -> list[int]:
    """Strides that mean something."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def _counted(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Elements of rows that see a key; rows: [batch, heads, query_len]. Heads of a merged result count where all of them see one."""
    batch, heads, query_len = rows.shape
    if rows.all():
        return torch.ones_like(tensor, dtype=torch.bool)
    if tensor.dim() == 4 and tensor.shape[:3] == (batch, heads, query_len):
        return rows[..., None].expand_as(tensor)
    if tensor.dim() == 4 and tensor.shape[:3] == (batch, query_len, heads):
        return rows.transpose(1, 2)[..., None].expand_as(tensor)
    if tensor.dim() == 3 and tensor.shape[:2] == (batch, query_len):
        return rows.all(1)[..., None].expand_as(tensor)
    if tensor.dim() == 4 and tensor.shape[:2] == (batch, heads) and tensor.shape[2] == -(-query_len // 2):
        return rows[:, :, ::2, None].expand_as(tensor)
    return torch.ones_like(tensor, dtype=torch.bool)


# -- runs ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    """The smallest program that failed, its error, and the script that shows it."""

    program: Program
    error: Exception
    script: Path


def fuzz(
    examples: int, seed: int, folder: Path = FOLDER, say: Callable[[str], None] = print, checker=check
) -> tuple[Tally, Failure | None]:
    """Checks that many random programs; stops at the first that fails, shrinks it and writes its script into `folder`."""
    tally, last = Tally(), []

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
        try:
            checker(program, tally)
        except Invalid:
            hypothesis.reject()
        except Exception as error:
            last[:] = [(program, error)]
            raise
        if tally.programs % 500 == 0:
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
    path.write_text(_SCRIPT.format(summary=summary, source=program.source, methods=METHODS, strict=STRICT, bound=BOUND))
    return path.absolute()


_SCRIPT = '''\
"""{summary}"""

import sys

{source}

METHODS = {methods}
STRICT = {strict}
BOUND = {bound}


def leaves(value):
    return list(value) if isinstance(value, tuple) else [value]


def main() -> int:
    wrong = 0
    rows = visible(inputs())
    print("rows that see a key:", rows.tolist())
    with torch.no_grad():
        arguments = inputs()
        want = leaves(program(**arguments)) + list(arguments.values())
        for name, options in METHODS.items():
            torch._dynamo.reset()
            arguments = mark(inputs())
            compiled = torch.compile(program, backend="sparsify", options=STRICT | options, fullgraph=True)
            got = leaves(compiled(**arguments)) + list(arguments.values())
            for place, (a, b) in enumerate(zip(got, want)):
                error = (a.double() - b.double()).abs().nan_to_num(torch.inf).max().item() if b.numel() else 0.0
                bound = BOUND.get(b.dtype, 0.0) * max(1.0, b.abs().max().item())
                if error > bound:
                    wrong = 1
                    print(f"{{name}}: tensor {{place}} differs by {{error:.2e}}, {{bound:.0e}} is allowed")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
'''


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="programs to check (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same programs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the script of a failure (default: %(default)s)")
    given = parser.parse_args(arguments)
    begin = time.perf_counter()
    tally, failure = fuzz(given.examples, given.seed, given.out)
    print(f"{tally}; {time.perf_counter() - begin:.0f} s")
    for reason, count in tally.reasons.most_common(12):
        print(f"  left as is {count:5d}: {reason}")
    if failure is None:
        return 0
    print(f"{failure.program}\n{type(failure.error).__name__}: {failure.error}\nrepro: {failure.script}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
