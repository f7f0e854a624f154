"""One scenario of one model: rewritten exactly, it equals eager execution; with sinks and a window it equals the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sparsify import api, pipeline
from sparsify.graph.unforeseen import UNREAD
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from tests.sweep.models import brief
from tests.sweep.oracle import SINKS, WINDOW, SinkWindow
from tests.sweep.scenarios import Scenario
from tests.sweep.seen import Seen

CLOSE = 1e-4
TELLING = 1e-3  # by how much a sparse run has to differ from a dense one to have shown anything
EXACT: dict[str, Any] = {"passes": ["dense"], "lower": "eager"}
SPARSE: dict[str, Any] = {"passes": ["sink_window"], "lower": "eager", "min_length": 0, "sink_window": {"sinks": SINKS, "window": WINDOW}}


@dataclass
class Finding:
    """What one scenario showed.

    verdict: "whole", "partly", "refused": how many attentions were rewritten; "none": there are none; "wrong": the numbers are not eager
        execution's, or a claim of ours did not hold; "crashed", "fell back": sparsify failed; "fails": transformers or torch does.
    sites, rewritten, graphs: counts. missed: attentions that eager execution has and no site stands for, where all is one graph.
    reasons: why sites were left, by count. error: largest difference to eager execution, relative to its largest number.
    note: what failed, and how. sparse: "agrees", "differs", "unlike" (the oracle masked other attentions than were rewritten), "alike" (too
        little was left out for a difference to show), "" where no site took the method.
    """

    verdict: str
    sites: int = 0
    rewritten: int = 0
    missed: int = 0
    graphs: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    note: str = ""
    sparse: str = ""


@dataclass
class _Ran:
    value: Tensor | None
    failure: Exception | None
    plans: list[Plan]

    @property
    def attentions(self) -> list[Decision]:
        return [d for plan in self.plans for d in plan.decisions if d.kind == "attention"]


@torch.no_grad()
def check(model: nn.Module, scenario: Scenario, sparse: bool = False) -> Finding:
    """sparse: whether sinks and a window are tried too, where an attention is causal."""
    try:
        torch.manual_seed(0)
        with Seen() as seen:
            want = scenario.call(model)
    except Exception as error:
        return Finding("fails", note=brief(error))
    whole = True
    got = _run(model, scenario, "sparsify", EXACT, fullgraph=True)
    if got.failure is not None:
        whole, got = False, _run(model, scenario, "sparsify", EXACT, fullgraph=False)
    found = _counted(got, seen.count, whole)
    if got.value is None:
        plain = _run(model, scenario, "eager", None, fullgraph=False)
        found.verdict = "crashed" if plain.failure is None else "fails"
        found.note = brief(got.failure or RuntimeError("no value"))
        return found
    found.error, odd = difference(got.value, want, scenario.rows)
    found.note = found.note or odd
    if not found.error < CLOSE:
        plain = _run(model, scenario, "eager", None, fullgraph=whole)
        if plain.value is None or difference(plain.value, want, scenario.rows)[0] < found.error / 3:
            found.verdict = "wrong"
            return found
        found.note = "; ".join([found.note, "as much as under torch.compile alone"]).removeprefix("; ")
    if fallback := next((plan.fallback for plan in got.plans if plan.fallback), ""):
        found.verdict, found.note = "fell back", fallback
    if any("causal" in d.mask and d.method for d in got.attentions) and sparse:
        found.sparse, note = _sparse(model, scenario, want, whole)
        if found.sparse == "differs":
            found.verdict, found.note = "wrong", note
    return found


def _counted(got: _Ran, seen: int, whole: bool) -> Finding:
    sites = got.attentions
    left = [d for d in sites if d.method is None]
    found = Finding("", sites=len(sites), rewritten=len(sites) - len(left), graphs=len(got.plans))
    found.reasons = dict(Counter(reason(text) for d in left for text in d.refusals or [d.reason]))
    found.missed = max(0, seen - len(sites)) if whole or not sites else 0
    if any("does not hold" in d.validation for d in left):
        found.verdict = "wrong"
    elif ours := next((text for text in found.reasons if f"{UNREAD}:" in text), ""):
        found.verdict, found.note = "crashed", ours
    elif not sites and not seen:
        found.verdict = "none"
    else:
        found.verdict = "refused" if not found.rewritten else "partly" if left or found.missed else "whole"
    return found


def reason(refusal: str) -> str:
    """A refusal without the method's name and the names of nodes, so that alike ones are one."""
    text = re.sub(r"^\w+: ", "", refusal)
    return re.sub(r"(?<=could not be read: )\w+: ", "", text)


def _sparse(model: nn.Module, scenario: Scenario, dense: Tensor, whole: bool) -> tuple[str, str]:
    torch.manual_seed(0)
    with SinkWindow() as oracle:
        want = scenario.call(model)
    got = _run(model, scenario, "sparsify", SPARSE, fullgraph=whole)
    if got.value is None:
        return "differs", brief(got.failure or RuntimeError("no value"))
    rewritten = sum(d.method is not None for d in got.attentions)
    if not rewritten:
        return "", ""
    if rewritten != oracle.changed:
        return "unlike", ""
    error, note = difference(got.value, want, scenario.rows)
    if not error < CLOSE:
        return "differs", note or f"with sinks and a window {error:.1e} from the oracle"
    return ("agrees" if difference(got.value, dense, scenario.rows)[0] > TELLING else "alike"), ""


@torch.no_grad()
def _run(model: nn.Module, scenario: Scenario, backend: str, options: dict[str, Any] | None, fullgraph: bool) -> _Ran:
    """The scenario under torch.compile; the model is as before afterwards."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    value, failure = None, None
    with warnings.catch_warnings(), _without_formulas(), api.collect_plans() as plans:
        warnings.simplefilter("ignore")
        model.compile(backend=backend, fullgraph=fullgraph, **({"options": options} if options else {}))
        try:
            value = scenario.call(model)
        except Exception as error:
            failure = error
        finally:
            model._compiled_call_impl = None
            torch._dynamo.reset()
        return _Ran(value, failure, list(plans))


@contextlib.contextmanager
def _without_formulas() -> Iterator[None]:
    """Costs in letters take longer than all else, and no one reads them here."""
    made = pipeline.make_context
    with mock.patch.object(pipeline, "make_context", lambda *given: dataclasses.replace(made(*given), formulas=False)):
        yield


def difference(got: Tensor, want: Tensor, rows: Tensor | None) -> tuple[float, str]:
    """The largest difference on the rows that count, relative to the largest number; and what is odd about it.

    Where eager execution gives no finite number, any is right.
    """
    if got.shape != want.shape:
        return float("inf"), f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if rows is not None and got.shape[:2] == rows.shape:
        got, want = got[rows], want[rows]
    got, want = got.double(), want.double()
    known = torch.isfinite(want)
    note = "" if known.all() else f"{int((~known).sum())} numbers of eager execution are not finite"
    if not torch.isfinite(got[known]).all():
        return float("inf"), "not finite where eager execution is"
    if not known.any():
        return 0.0, note
    return float((got[known] - want[known]).abs().max() / want[known].abs().max().clamp_min(1e-30)), note
