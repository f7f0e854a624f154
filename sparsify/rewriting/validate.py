"""Validates a rewriting before it is used: executes a site and its rewriting on small random instances and compares them.

The site's region (`sparsify.rewriting.region`) and its rewriting under keep-all settings, with which the method must equal dense attention,
run in eager PyTorch on the CPU on small random instances (`sparsify.rewriting.instances`) and are compared element by element. One site is
checked for all sites whose regions do the same with inputs of the same dtypes and sizes and which the same method serves.

This is translation validation (Pnueli, Siegel, Singerman: Translation Validation, TACAS 1998): instead of proving the compiler once, each
of its translations is checked when it is made.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import _disable_current_modes

from sparsify.errors import SparsifyError
from sparsify.graph import unforeseen
from sparsify.masks.symbolic import find_shape_env
from sparsify.matching.eager_ops import is_softmax
from sparsify.rewriting import instances
from sparsify.rewriting.editor import Editor, mutates
from sparsify.rewriting.instances import STYLES, Guards, InstanceError, Numbers
from sparsify.rewriting.region import AUTOCAST, Region, RegionError, Regions

# Largest difference allowed, relative to the largest value of the output (at least 1). Eager rounds scores and weights in half precision.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Multiply-adds of attention, and elements of a mask, that an instance at the graph's own sizes may take.
_MOST_WORK, _MOST_ELEMENTS = 1 << 28, 1 << 21
_SEEDS = 3  # draws of sizes for one style of contents


@dataclass(frozen=True)
class Outcome:
    """Result of validating one site.

    verdict: "agrees" when all compared instances agree, "differs" when one does not, "unchecked" when none could be run.
    why: the element that differs, or what prevented a run.
    instances: number of instances compared.
    """

    verdict: Literal["agrees", "differs", "unchecked"]
    why: str = ""
    instances: int = 0

    def describe(self) -> str:
        """The result as a phrase for plans and warnings."""
        if self.verdict == "agrees":
            return f"{self.instances} instances agree"
        return f"what was proved does not hold when it is run: {self.why}" if self.verdict == "differs" else f"cannot be run: {self.why}"


class Validator:
    """Validates the sites of one graph.

    It must be made before planning, whose guards on sizes are not part of what was proved.
    """

    def __init__(self, graph: fx.Graph, serving: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext):
        """Args:
        graph: the graph as captured.
        serving: makes a context in which sparsify's ops run their reference implementation.
        """
        self.graph, self.serving = graph, serving
        self.guards = Guards(find_shape_env(graph))
        self._regions: Regions | None = None
        self._known: dict[str, Outcome] = {}

    def check(self, site: Any, method: Any) -> Outcome:
        """Compares a site with the method's rewriting of it."""
        if self._regions is None:
            self._regions = Regions(self.graph)
        exact = method.keep_all()
        try:
            nodes, given = self._regions.cut(site)
            kind = self._regions.kind(site, nodes, given, (type(exact), exact))
            if kind not in self._known:
                # a context of its own: whoever observes selections or skipped blocks here must not see those of small instances
                self._known[kind] = contextvars.Context().run(self._run, self._regions.region(site, nodes, given), exact)
        except RegionError as error:
            return Outcome("unchecked", str(error))
        except Exception as error:
            return Outcome("unchecked", unforeseen.reason(error, site.name))
        return self._known[kind]

    def _run(self, region: Region, method: Any) -> Outcome:
        original, rewritten = region.graph, fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        rewritten.graph_copy(original, mapping)
        for node, copy in mapping.items():
            copy.meta = dict(node.meta)
        editor = Editor(rewritten)
        site = region.site.mapped(mapping)
        try:
            method.rewrite(editor, editor.converted(site))
        except SparsifyError as error:
            return Outcome("unchecked", f"its region cannot be rewritten by itself: {error}")
        pair = _Pair(region, original, rewritten, region.site.output, editor.replaced[site.output], self.guards)
        with self.serving():
            return pair.compare()


@dataclass(frozen=True)
class _Pair:
    region: Region
    original: fx.Graph
    rewritten: fx.Graph
    output: fx.Node
    replaced: fx.Node
    guards: Guards

    def compare(self) -> Outcome:
        wanted = instances.symbols(self.original) | instances.symbols(self.rewritten)
        compared, trouble, differences = 0, "", ""
        for number, style in enumerate(self.styles()):
            for draw in range(_SEEDS):
                try:
                    made = instances.make(self.region, wanted, self.guards, 101 * number + draw, style)
                    difference = self.difference(*made)
                except (InstanceError, _CannotRun) as error:
                    trouble = str(error)
                    continue
                if difference and not made[0].fixed:
                    return Outcome("differs", difference)
                differences = differences or difference
                compared += 1
                break
            if differences:
                break
        if compared and not differences:
            return Outcome("agrees", instances=compared)
        # mapped numbers may have lost a relation that the graph relies on: its own numbers decide
        return self.at_full_size(wanted, differences, trouble)

    def styles(self) -> tuple[str, ...]:
        """Kinds of contents to try: all of them where an input is of integers or booleans, else two."""
        data = (n.meta.get("example_value") for n in self.original.nodes if n.op == "placeholder")
        flags = any(isinstance(v, torch.Tensor) and not v.dtype.is_floating_point for v in data)
        return STYLES if flags else STYLES[:2]

    def at_full_size(self, wanted: set[sympy.Symbol], differences: str, trouble: str) -> Outcome:
        compared = 0
        for seed, style in enumerate(self.styles() if self.affordable() else ()):
            try:
                difference = self.difference(*instances.make(self.region, wanted, self.guards, seed, style, mapped=False))
            except (InstanceError, _CannotRun) as error:
                trouble = str(error)
                continue
            if difference:
                return Outcome("differs", difference)
            compared += 1
        if compared:
            return Outcome("agrees", instances=compared)
        return Outcome("differs", differences) if differences else Outcome("unchecked", trouble)

    def affordable(self) -> bool:
        elements = 1
        for node in self.original.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                count = 1
                for size in value.shape:
                    count *= 16 if isinstance(size, torch.SymInt) else size
                elements = max(elements, count)
        width = max((int(s) for s in self.output.meta["example_value"].shape[-1:] if isinstance(s, int)), default=1)
        return elements <= _MOST_ELEMENTS and elements * width <= _MOST_WORK

    def difference(self, numbers: Numbers, values: dict[str, Any]) -> str:
        """Where the two disagree on one instance, or nothing.

        Raises:
            _CannotRun: the original itself fails on it, or rounds too far for a difference to say anything.
        """
        with _quiet(self.output):
            try:
                want = execute(self.original, self.output, values, numbers, checked=True)
            except InstanceError:
                raise
            except Exception as error:
                raise _CannotRun(f"the graph itself fails on a small instance: {type(error).__name__}: {error}") from error
            try:
                got = execute(self.rewritten, self.replaced, values, numbers)
            except InstanceError:
                raise
            except Exception as error:
                what = f"the rewriting fails where the graph does not: {type(error).__name__}: {error}"
                if numbers.fixed:  # it may hold a number that was made of the graph's and is not made small with them
                    raise _CannotRun(what) from error
                return what
        if self.cpu_alone_averages():
            seen = ~(got == 0).all(-1, keepdim=True)
            want, got = want * seen, got * seen
        if not bool(want.isfinite().any()):
            raise _CannotRun("an instance has nothing finite to compare")
        found = different(want, got, self.tolerance() + 2 * self.lost_digits(numbers, values))
        if found and (rounded := self.rounded_scores(numbers, values)):
            if rounded > _MOST_ROUNDED:
                raise _CannotRun(f"half precision rounds the scores of an instance by {rounded:.1g}")
            found = different(want, got, self.tolerance() + 2 * rounded)
        return found

    def lost_digits(self, numbers: Numbers, values: dict[str, Any]) -> float:
        """How far scores are rounded by the sum with the largest bias, where most of them is left: kernels add biases elsewhere
        and round otherwise, which shows in rows whose keys all get that bias."""
        found = 0.0
        for bias in getattr(self.region.site, "bias", ()):
            with _quiet(self.output):
                value = execute(self.original, bias.node, values, numbers)
            sizes = value[value.isfinite()].double().abs() * abs(bias.scale) * torch.finfo(value.dtype).eps
            found = max([found, *sizes[sizes < _MOST_LOST].flatten().tolist()])
        return found

    def rounded_scores(self, numbers: Numbers, values: dict[str, Any]) -> float:
        """How far written-out scores are rounded in half precision: a row's average by its weights, in the row where that is most."""
        softmax = next((n for n in reversed(list(self.original.nodes)) if is_softmax(n)), None)
        if softmax is None or self.tolerance() < TOLERANCE[torch.float16]:
            return 0.0
        with _quiet(self.output):
            scores = execute(self.original, softmax.all_input_nodes[0], values, numbers).double()
            weights = execute(self.original, softmax, values, numbers).double()
        # of what is hidden by a large number, as in rows that see nothing, no digit counts
        scores = scores.where(scores.abs() < _HIDING, 0.0)
        each = max(torch.finfo(dtype).eps for dtype in self.score_dtypes(softmax)) * scores.abs()
        return float((weights.nan_to_num() * each).sum(-1).max()) if each.numel() else 0.0

    def score_dtypes(self, softmax: fx.Node) -> set[torch.dtype]:
        """Of everything before the softmax that has the scores' shape."""
        shape = lambda node: tuple(map(str, node.meta["example_value"].shape))
        tensors = (n for n in _needed(self.original, softmax) if n is not softmax and isinstance(n.meta.get("example_value"), torch.Tensor))
        alike = (n.meta["example_value"].dtype for n in tensors if shape(n) == shape(softmax))
        return {dtype for dtype in alike if dtype.is_floating_point}

    def cpu_alone_averages(self) -> bool:
        """Whether rows that see no key are 0 on the site's device and an average on the CPU: under a float mask, fused kernels of GPUs
        take the lowest finite number for -inf."""
        site = self.region.site
        mask = site.mask_node.meta["example_value"] if getattr(site, "mask_node", None) is not None else None
        cuda = self.output.meta["example_value"].device.type == "cuda"
        return cuda and mask is not None and mask.dtype.is_floating_point and (site.source, site.empty_rows) == ("sdpa", "zero")

    def tolerance(self) -> float:
        """The tolerance of the least exact dtype that the graph computes in."""
        values = (n.meta.get("example_value") for n in self.original.nodes)
        return max(TOLERANCE.get(v.dtype, 1e-4) for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point)


_MOST_LOST = 0.01  # rounding of scores from which a comparison would say little
_MOST_ROUNDED = 0.1  # the same, where the rounding of every score is looked at
_HIDING = 5000.0  # scores beyond it are hidden by a number


class _CannotRun(Exception):
    """The original graph itself fails on an instance."""


@contextlib.contextmanager
def _quiet(output: fx.Node) -> Generator[None]:
    """Real tensors on the CPU, no gradients, and the autocast of the site's device."""
    device = output.meta["example_value"].device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    half = torch.get_autocast_dtype(device) if casts else None
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", dtype=half, enabled=half is not None, cache_enabled=False):
        yield


def execute(graph: fx.Graph, target: fx.Node, values: dict[str, Any], numbers: Numbers, checked: bool = False) -> torch.Tensor:
    """The value of a region's node: every node that it needs and every write to memory before it, in order.

    values: of the placeholders by name; they are copied, since a region may write to them.
    checked: whether every value must be as the graph says. A rewriting's own values need not: its blocks are not made small as sizes are.

    Raises:
        InstanceError: as `_check`, where `checked`.
    """
    needed = _needed(graph, target)
    env: dict[fx.Node, Any] = {}
    entered: list[Any] = []
    try:
        for node in (n for n in graph.nodes if n in needed):
            env[node] = _value(node, env, values, numbers)
            if checked and isinstance(env[node], torch.Tensor):
                _check(node, env[node], numbers)
            if node.target in AUTOCAST:
                entered.append(env[node]) if env[node] is not None else entered.pop()
            if node is target:
                break
    finally:
        for mode in reversed(entered):
            torch.amp.autocast_mode._exit_autocast(mode)
    return env[target]


def _value(node: fx.Node, env: dict[fx.Node, Any], values: dict[str, Any], numbers: Numbers) -> Any:
    example = node.meta.get("example_value")
    if node.op == "placeholder":
        value = values[node.name]
        return value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value
    if isinstance(example, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)):
        return numbers.concrete(example)
    value = _call(node, env, numbers)
    if isinstance(example, torch.Tensor) and value.dtype.is_floating_point and torch.is_autocast_enabled("cpu"):
        value = value.to(example.dtype)  # devices differ in what autocast keeps in float32
    return value


def _check(node: fx.Node, value: torch.Tensor, numbers: Numbers) -> None:
    """Raises InstanceError where a shape or dtype is not the graph's, or random contents overflow to +inf, as real ones would not."""
    example = node.meta["example_value"]
    if tuple(value.shape) != numbers.concrete(example.shape):
        raise InstanceError(f"{node.name} has the shape {tuple(value.shape)} instead of {numbers.concrete(example.shape)}")
    if value.dtype is not example.dtype:
        raise InstanceError(f"{node.name} is {value.dtype} on the CPU instead of {example.dtype}")
    if value.is_floating_point() and bool((value == torch.inf).any()):
        raise InstanceError(f"{node.name} overflows")


def _needed(graph: fx.Graph, target: fx.Node) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    calls = (n for n in graph.nodes if n.op in ("call_function", "call_method"))
    pending = [target, *(n for n in calls if mutates(n) or n.target in AUTOCAST)]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _call(node: fx.Node, env: dict[fx.Node, Any], numbers: Numbers) -> Any:
    # an operand of our ops such as the block size is no size of the graph
    ours = getattr(node.target, "namespace", "") == "sparsify"

    def bind(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, int) and not isinstance(value, bool) and not ours:
            return numbers.concrete(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, str) and value.split(":")[0] == "cuda":
            return "cpu"
        return value

    args: tuple[Any, ...] = map_aggregate(node.args, bind)
    if node.target is AUTOCAST[0] and args[1] is None:
        args = (args[0], torch.get_autocast_dtype(str(node.args[0])), *args[2:])  # the device's own default
    kwargs: dict[str, Any] = map_aggregate(node.kwargs, bind)
    if ours and "windows" in kwargs:
        kwargs = {**kwargs, "windows": [numbers.concrete(w) for w in kwargs["windows"]]}
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if _has_negative_scale(node, kwargs):
        return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return node.target(*args, **kwargs)


def _has_negative_scale(node: fx.Node, kwargs: dict[str, Any]) -> bool:
    """Whether a call is causal attention with a scale that is not positive: torch's fused CPU kernel masks before it scales and gives NaN
    there; other kernels do not."""
    if getattr(node.target, "__name__", "") != "scaled_dot_product_attention" or len(node.args) > 3:
        return False
    scale = kwargs.get("scale")
    return scale is not None and scale <= 0 and kwargs.get("attn_mask") is None


def different(want: torch.Tensor, got: torch.Tensor, tolerance: float) -> str:
    """The first element in which two outputs differ by more than the tolerance, in words; empty without one."""
    if want.shape != got.shape or want.dtype is not got.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
    if want.numel() == 0:
        return ""
    one, other = want.double(), got.double()
    finite = one[one.isfinite()]
    bound = tolerance * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
    equal = torch.isclose(one, other, rtol=0.0, atol=bound, equal_nan=True)
    if bool(equal.all()):
        return ""
    place = tuple(int(i) for i in (~equal).nonzero()[0])
    return f"element {list(place)} of an instance of {list(want.shape)} is {other[place].item():.4g} instead of {one[place].item():.4g}"
