"""Runs a random attention program in eager PyTorch, as each method rewrites its graph, and compiled as a whole, and compares everything."""

from __future__ import annotations

import collections
import contextlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import pipeline
from sparsify.matching.attention import is_sdpa
from sparsify.matching.eager_ops import is_softmax
from sparsify.planning import registry
from sparsify.planning.choose import Plan
from sparsify.planning.config import config
from sparsify.rewriting.trace import Trace
from tests.fuzz.around import PLAIN, Around
from tests.fuzz.graphs import Program

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention"], "xattention": {"threshold": 1.0, "block": 64}},
    "sink_window": {"passes": ["sink_window"], "sink_window": {"sinks": 2, "window": 1 << 20}},
}
STRICT = {"strict": True, "lower": "eager", "min_length": 0}
# largest difference allowed, relative to the largest value of the output: two roundings of scores of up to about ten
BOUND = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Wrong(AssertionError):
    """A rewritten program gave another result."""


@dataclass
class Tally:
    """What happened to the programs and sites seen so far.

    kinds: programs by what they are wrapped in. rewritten: sites by method. reasons: of sites that the dense method left as they are.
    invalid: why drawn programs were not run. reran: programs that went through torch.compile as a whole.
    """

    programs: int = 0
    sites: int = 0
    reran: int = 0
    kinds: collections.Counter = field(default_factory=collections.Counter)
    rewritten: collections.Counter = field(default_factory=collections.Counter)
    reasons: collections.Counter = field(default_factory=collections.Counter)
    invalid: collections.Counter = field(default_factory=collections.Counter)

    def add(self, name: str, plan: Plan) -> None:
        self.rewritten[name] += len(plan.rewritten)
        if name == "dense":
            self.sites += len(plan.decisions)
            self.reasons.update(d.reason for d in plan.decisions if d.method is None)

    def join(self, other: Tally) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {count}" for name, count in sorted(self.rewritten.items()))
        return f"{self.programs} programs, {self.sites} sites; rewritten by {shares}; {self.reran} compiled whole"


def check(program: Program, tally: Tally | None = None, methods: dict[str, dict[str, Any]] = METHODS, every_row: bool = True) -> None:
    """Captures the program's graph once and runs it as it is and as each method rewrites it, on equal inputs; some programs are compiled
    as a whole and called, by two threads too.

    every_row: rows that see no key count for the dense method; else for none.

    Raises:
        Wrong: a result, a gradient or a side effect differs, or a call of scaled_dot_product_attention is missing from the plan.
        Exception: whatever the compiler raised under `strict`.
    """
    tally = Tally() if tally is None else tally
    names = program.load()
    with warnings.catch_warnings(), names["around"]():
        warnings.simplefilter("ignore")
        with _invalid(tally):
            rows = names["visible"](names["inputs"]())
            names["program"](**names["inputs"]())
            if not every_row and not rows.all() and program.around.kind != "plain":
                raise Invalid("rows that see no key")
            graph = _captured(names["program"], names["mark"](names["inputs"]()))
            want = graph.run(graph.module.forward)
        tally.programs += 1
        tally.kinds[program.around.kind] += 1
        slack = Slack.of(program)
        for name, options in methods.items():
            settings = config.load({**STRICT, **options}, method_models=registry.discover(), environ={})
            plan, rewritten, _ = pipeline.rewrite_graph(pipeline.copy_graph(graph.module), settings, Trace(None))
            tally.add(name, plan)
            if len(plan.decisions) < program.sdpa:
                raise Wrong(f"{program.sdpa} attentions, {len(plan.decisions)} in the plan")
            if name == "dense" and len(plan.decisions) > 1:
                _follow(graph, plan)
            if rewritten is not None:
                if len(plan.rewritten) == len(plan.decisions) and name != "dense":
                    _alone(rewritten, name)
                compare(graph.run(rewritten.forward), want, torch.ones_like(rows) if every_row and name == "dense" else rows, name, slack)
        if program.around.kind == "threads" or program.digest % 8 == 0:
            tally.reran += 1
            _compiled(program, names, every_row, slack)


def _follow(graph: Captured, plan: Plan) -> None:
    """A plan that leaves every second site alone is followed site by site, whatever the sites are called."""
    plan = Plan.from_json(plan.to_json())
    for decision in plan.decisions[::2]:
        decision.method, decision.options = None, {}
    with tempfile.TemporaryDirectory() as folder:
        plan.save(path := f"{folder}/plan.json")
        settings = config.load({**STRICT, "plan": path}, method_models=registry.discover(), environ={})
        followed, _, _ = pipeline.rewrite_graph(pipeline.copy_graph(graph.module), settings, Trace(None))
    got, want = ([d.method for d in p.decisions] for p in (followed, plan))
    if got != want:
        raise Wrong(f"a plan of {want} is followed as {got}")


@contextlib.contextmanager
def _invalid(tally: Tally) -> Iterator[None]:
    """What PyTorch itself does not run is no program."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, Invalid) else Invalid(f"{type(error).__name__}: {error}".splitlines()[0][:80])
        tally.invalid[str(reason)] += 1
        raise reason from error


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
        """Results (and gradients), and the arguments afterwards."""
        arguments = [_copy(a) for a in self.arguments]
        return with_gradients(list(forward(*arguments)), arguments), arguments


def _copy(value: Any) -> Any:
    """Equal, with memory of its own; a leaf stays one."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def with_gradients(results: list[Any], arguments: list[Any]) -> list[Any]:
    """The results, whether each needs a gradient, and the gradients of the arguments that need one."""
    needing = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad and a.is_leaf]
    flags = torch.tensor([isinstance(r, torch.Tensor) and r.requires_grad for r in results])
    results = [r.detach() if isinstance(r, torch.Tensor) else r for r in results]
    if not needing or not leaves:
        return [*results, flags]
    weights = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape) for r in needing]
    gradients = torch.autograd.grad(needing, leaves, weights, allow_unused=True)
    return [*results, flags, *gradients]


def _captured(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Captured:
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def first_call(*arguments: Any) -> Any:
            found.append(Captured(gm, tuple(map(_copy, arguments))))
            return gm.forward(*arguments)

        return first_call

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(**inputs)
    if len(found) != 1:
        raise Invalid(f"{len(found)} graphs")
    return found[0]


def _compiled(program: Program, names: dict, every_row: bool, slack: Slack) -> None:
    """The program as users compile it, called with two sets of inputs: one after the other, or by two threads at once."""
    torch._dynamo.reset()
    compiled = torch.compile(names["program"], backend="sparsify", options={**STRICT, "exact": True}, fullgraph=True)
    failures: list[Exception] = []

    def call(seed: int, times: int) -> None:
        try:
            with names["around"]():
                inputs = names["inputs"](seed)
                rows = names["visible"](inputs)
                want = _call(names["program"], names["inputs"](seed))
                for _ in range(times):
                    counted = torch.ones_like(rows) if every_row else rows
                    compare(_call(compiled, names["mark"](names["inputs"](seed))), want, counted, "compiled", slack)
        except Exception as error:
            failures.append(error)

    seeds = (11, 12)
    if program.around.kind != "threads":
        for seed in seeds:
            call(seed, 1)
    else:
        threads = [threading.Thread(target=call, args=(seed, 3)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _call(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> tuple[list[Any], list[Any]]:
    found = function(**inputs)
    arguments = list(inputs.values())
    return with_gradients(list(found) if isinstance(found, (tuple, list)) else [found], arguments), arguments


@dataclass(frozen=True)
class Slack:
    """How far from equal is equal: autocast rounds on the way, derivatives add roundings up, and scores that -10000 is added to keep
    three decimal places in float32."""

    around: Around = PLAIN
    rounded: bool = False

    @classmethod
    def of(cls, program: Program) -> Slack:
        return cls(program.around, "-10000.0" in program.source)

    def __call__(self, dtype: torch.dtype) -> float:
        bound = BOUND[dtype]
        if self.around.rounds:
            bound = max(bound, BOUND[getattr(torch, self.around.rounds)])
        if self.rounded and dtype is torch.float32:
            bound = max(bound, 2 * 10000.0 * torch.finfo(dtype).eps)
        return bound * (10 if self.around.kind in DERIVATIVES else 1)


DERIVATIVES = {"grad", "vjp", "jvp", "beside grad", "needs grad", "enable_grad in no_grad", "grad switched on"}


def compare(got: tuple[list, list], want: tuple[list, list], rows: torch.Tensor, name: str, slack: Callable[..., float] = Slack()) -> None:
    """Results and arguments after the call, tensor by tensor.

    Rows that see no key are left out of 4-D results, whatever their layout, where `rows` says so. Where eager's own value is not finite,
    anything goes as long as not a number stays so.

    Raises:
        Wrong: naming the first tensor that differs.
    """
    for kind, ours, theirs in (("result", got[0], want[0]), ("argument", got[1], want[1])):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(b, torch.Tensor) or not isinstance(a, torch.Tensor):
                if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
                    raise Wrong(f"{name}: {kind} {place} is {type(a).__name__}, not {type(b).__name__}")
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
            bound = slack(b.dtype) * max(1.0, b[counted].abs().max().item() if counted.any() else 0.0)
            if b.dtype is not torch.float16 and ((a.isnan() != b.isnan()) & _counted(b, rows)).any():
                raise Wrong(f"{name}: {kind} {place}: one is not a number where the other is")
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
