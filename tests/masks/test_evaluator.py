"""Mask graphs have two readers: the evaluator of the tests equals eager PyTorch, and what is proved of a mask equals the evaluator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from torch import fx, nn

from sparsify.masks import prove as predicates
from sparsify.masks.predicate import Leaf, MaskPredicate
from sparsify.masks.reader import _READINGS
from sparsify.matching.attention import find_attention
from tests.support.cases import examples as drawn
from tests.support.mask_evaluator import OPERATORS, Array, Evaluator, Unevaluable, indices
from tests.support.mask_graphs import Builder, mask_graphs


def same(found: Array, real: torch.Tensor) -> bool:
    pairs = zip(found.data, real.reshape(-1).tolist(), strict=True)
    return found.shape == tuple(real.shape) and found.dtype is real.dtype and all(x == y or (x != x and y != y) for x, y in pairs)


def check_evaluator(b: Builder, evaluator: Evaluator) -> int:
    """Every node that is interpreted has eager's value; how many are not."""
    unknown = 0
    for node, real in b.real.items():
        if isinstance(real, torch.Tensor) and node not in b.inputs and "attention" not in node.name:
            try:
                found = evaluator.value(node)
            except Unevaluable:
                unknown += 1
                continue
            assert same(found, real), f"{node.format_node()}\n{found}\n{real}\n{b.graph}"
    return unknown


class Clauses:
    """A proved mask, clause by clause as `sparsify.masks.predicate` defines them, in plain Python."""

    def __init__(self, mask: MaskPredicate, b: Builder, evaluator: Evaluator):
        self.mask, self.evaluator, self.symbols = mask, evaluator, _symbols(b)
        self.start = b.sizes["K"] - b.sizes["Q"]
        if not mask.query_start.bottom_right:
            self.start = 0 if mask.query_start.constant is None else self.number(mask.query_start.constant)
            if mask.query_start.leaf is not None:
                self.start += evaluator.value(mask.query_start.leaf).data[0]

    def number(self, expression: Any) -> int:
        return int(sympy.sympify(expression).xreplace(self.symbols))

    def of(self, leaf: Leaf, b: int, place: int) -> Any:
        """leaf[b, place + shift]; one row serves all."""
        value = self.evaluator.value(leaf.node)
        rows = value.shape[0] if len(value.shape) > 1 else 1
        columns = value.shape[-1]
        place += self.number(leaf.shift)
        assert 0 <= place < columns
        return value.data[(b if rows > 1 else 0) * columns + place]

    def __call__(self, b: int, q: int, k: int) -> bool:
        mask, row = self.mask, q + self.start
        seen = not mask.causal or k <= row
        seen = seen and (mask.window is None or k > row - mask.window)
        if seen and mask.padding is not None:
            seen = getattr(operator, mask.padding.relation)(self.of(mask.padding, b, k), mask.padding.number)
        return bool(seen and (mask.documents is None or self.of(mask.documents, b, k) == self.of(mask.documents, b, row)))


def _symbols(b: Builder) -> dict[sympy.Expr, sympy.Integer]:
    found = {}
    for node, real in b.inputs.items():
        for symbolic, size in zip(node.meta["example_value"].shape, real.shape, strict=True):
            if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                found[symbolic.node.expr] = sympy.Integer(size)
    return found


def visible(value: Any, dtype: torch.dtype) -> bool | None:
    """What one element of a mask says; None for a bias."""
    if dtype is torch.bool:
        return value
    if value == 0:
        return True
    return False if value <= torch.finfo(dtype).min else None


def check_proof(b: Builder, mask: fx.Node, evaluator: Evaluator) -> bool:
    """Whether something was proved; it holds at every (b, h, q, k)."""
    (site,) = find_attention(fx.GraphModule(nn.Module(), b.graph))
    if site.near_miss or site.mask.opaque or site.bias or site.alibi_slopes is not None:
        return False
    try:
        said = evaluator.value(mask)
    except Unevaluable:
        return False
    clauses = Clauses(site.mask, b, evaluator)
    skip = 4 - len(said.shape)
    for place in indices(b.sizes.values()):
        element = said[[0 if size == 1 else place[skip + d] for d, size in enumerate(said.shape)]]
        proved = clauses(place[0], place[2], place[3])
        assert visible(element, said.dtype) is proved, f"at {place}: {element}, proved {site.mask.describe()}: {proved}\n{b.graph}"
    return True


@dataclass
class Counts:
    """unknown: nodes that are not interpreted. proved: masks of which something was proved."""

    graphs: int = 0
    nodes: int = 0
    unknown: int = 0
    proved: int = 0


def run(examples: int, seed: int, proofs: bool, phases: tuple[Phase, ...] = (Phase.generate, Phase.shrink)) -> Counts:
    counts = Counts()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(mask_graphs())
    def one(drawn: tuple[Builder, fx.Node]) -> None:
        b, mask = drawn
        evaluator = Evaluator(b.inputs)
        if proofs:
            counts.proved += check_proof(b, mask, evaluator)
        else:
            counts.unknown += check_evaluator(b, evaluator)
        counts.graphs += 1
        counts.nodes += len(b.real)

    one()
    return counts


@drawn(quick=30, slow=200)
def test_the_evaluator_equals_eager(examples):
    counts = run(examples, seed=0, proofs=False)
    assert counts.unknown < counts.nodes / 12, counts  # draws follow the numbers in the source text (hypothesis)


@drawn(quick=30, slow=200)
def test_what_is_proved_of_a_mask_equals_the_evaluator(examples):
    counts = run(examples, seed=0, proofs=True)
    assert counts.proved > counts.graphs / 10, counts


def _wider(proof: MaskPredicate) -> MaskPredicate:
    return replace(proof, window=proof.window + 1) if proof.window else replace(proof, window=1)


_SPOILED = {
    "window": _wider,
    "padding": lambda proof: replace(proof, padding=None),
    "causal": lambda proof: replace(proof, causal=False),
}


@pytest.mark.parametrize("clause", _SPOILED)
def test_a_wrong_proof_is_found(monkeypatch, clause):
    real = predicates.prove
    monkeypatch.setattr(predicates, "prove", lambda *given: real(*given) if real(*given).opaque else _SPOILED[clause](real(*given)))
    with pytest.raises(AssertionError, match="proved"):
        run(400, seed=0, proofs=True, phases=(Phase.generate,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("proofs", [False, True])
def test_many_masks(seed, proofs):
    run(1000, seed, proofs)


def test_every_operator_that_is_read_is_interpreted():
    words = {name.strip("_") if name.startswith("__") else name for name in _READINGS}
    known = {*OPERATORS, "and", "or", "T", "mT", "H", "mH"}  # attributes go through getattr
    assert words <= known, words - known
