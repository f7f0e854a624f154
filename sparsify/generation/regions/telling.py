"""What plans are told of a model's calls: each thing once."""

from __future__ import annotations

from typing import Any

from sparsify import pipeline
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan


def is_new(told: set[Any], key: Any) -> bool:
    """Whether plans are collected, and none says this yet; from now on one does. told: what plans say already."""
    if pipeline.collector.get() is None or key in told:
        return False
    told.add(key)
    return True


def tell(decision: Decision, device: str = "") -> None:
    """Adds a decision about a model's call to the plans that are collected, if any are. device: as in `Plan`."""
    if (plans := pipeline.collector.get()) is not None:
        plans.append(Plan([decision], device=device, serves=1))
