"""Checks a rewritten graph: its structure always, its numbers on request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsify.errors import VerifyError
from sparsify.rewriting.editor import Editor, mutates

log = logging.getLogger(__name__)

# Largest difference allowed between two exact evaluations of a whole graph, relative to the largest value of the output.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def structure(before: fx.GraphModule, after: fx.GraphModule, editor: Editor, expected: int) -> None:
    """Checks that the graph lints, that every site was replaced by a value of the same shape, dtype, device and strides, that replaced
    nodes are gone, and that no mutation is lost.

    Args:
        before, after: the graph before and after rewriting.
        editor: what rewrote it.
        expected: number of sites that were to be rewritten.

    Raises:
        VerifyError: names the first check that failed.
    """
    try:
        after.graph.lint()
    except Exception as error:
        raise VerifyError(f"the rewritten graph is malformed: {error}") from error
    if len(editor.replaced) != expected:
        raise VerifyError(f"{expected} sites were to be rewritten, {len(editor.replaced)} were")
    for old, new in editor.replaced.items():
        if not old._erased:
            raise VerifyError("what was replaced is still read", where=old.name)
        want, got = old.meta["example_value"], new.meta["example_value"]
        for what in ("shape", "dtype", "device"):
            if getattr(want, what) != getattr(got, what):
                raise VerifyError(f"{what} changed from {getattr(want, what)} to {getattr(got, what)}", where=old.name)
        # the stride of a dimension of size 1 is never used, and views differ in it
        used = [d for d, size in enumerate(want.shape) if not (isinstance(size, int) and size == 1)]
        if any(want.stride(d) != got.stride(d) for d in used) and want.numel() != 0:
            raise VerifyError(f"strides changed from {want.stride()} to {got.stride()}", where=old.name)
    lost = _mutations(before) - _mutations(after) - editor.superseded
    if lost:
        raise VerifyError(f"a mutation was lost: {sorted(lost)[0]}")


def _mutations(gm: fx.GraphModule) -> set[str]:
    return {n.name for n in gm.graph.nodes if n.op in ("call_function", "call_method") and mutates(n)}


@dataclass(frozen=True)
class Agreement:
    """What comparing a graph with its rewriting found.

    worst: largest relative difference where both are finite, in units of the dtype's tolerance; at most 1.
    strange: rows, over all outputs, in which the untouched graph has NaN or an infinity and the rewriting something else.
    """

    worst: float
    strange: int


def numbers(reference: Callable[..., Any], candidate: Callable[..., Any], inputs: Sequence[Any], empty_rows: bool = False) -> Agreement:
    """Runs both callables on copies of the inputs and compares every floating-point output.

    Where the reference has NaN or an infinity, the candidate has to have the same; but rows that see no key may be anything, and attention
    reads them: a kernel that leaves out hidden blocks never multiplies their NaN by a weight of 0. Such rows are counted, with a warning.

    Args:
        empty_rows: whether attention in the graph may have rows that see no key.

    Raises:
        VerifyError: an output differs by more than its dtype's tolerance, or is not finite where the reference is; without `empty_rows`
            also where the reference is not finite and the candidate differs.
    """
    want, got = (pytree.tree_leaves(f(*_copies(inputs))) for f in (reference, candidate))
    worst, strange = 0.0, 0
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.numel() == 0:
            continue
        bound = TOLERANCE.get(a.dtype, 1e-6)
        finite = torch.isfinite(a)
        rows = max(1, a.numel() // a.shape[-1]) if a.dim() else 1
        if broken := _rows(finite & ~torch.isfinite(b)):
            raise VerifyError(f"output {i} is not finite in {broken} of {rows} rows, where the untouched graph is")
        if other := _rows(~finite & (a != b) & ~(a.isnan() & b.isnan())):
            what = f"output {i}: in {other} of {rows} rows the untouched graph has NaN or an infinity, and the rewritten one something else"
            if not empty_rows:
                raise VerifyError(f"{what}, though every row sees a key")
            log.warning("%s: rows that see no key, as padding has, or that read such rows", what)
            strange += other
        scale = a[finite].abs().max().item() if finite.any() else 1.0
        error = (a - b)[finite].abs().max().item() / max(scale, 1e-6) if finite.any() else 0.0
        if not error <= bound:
            raise VerifyError(f"output {i} differs by {error:.2e} of its largest value; {bound:.0e} is allowed for {a.dtype}")
        worst = max(worst, error / bound)
    log.info("verified: largest difference %.2f of the tolerance", worst)
    return Agreement(worst, strange)


def _rows(where: torch.Tensor) -> int:
    """Rows, along the last dimension, in which some element is True."""
    return int((where.any(-1) if where.dim() else where).sum())


def _copies(inputs: Sequence[Any]) -> list[Any]:
    return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]
