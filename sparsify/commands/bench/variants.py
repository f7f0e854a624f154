"""In which ways `sparsify bench` runs a model."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch

from sparsify import api
from sparsify.commands.bench.registry import Subject
from sparsify.generation.regions import regional

# name: what it is, for --help
VARIANTS = {
    "eager": "the model as it is",
    "inductor": "torch.compile by itself",
    "sparsify": "with the configuration in effect",
    "exact": "the same, without what changes the result",
}


@contextlib.contextmanager
def compiled(subject: Subject, variant: str) -> Generator[None]:
    """In this block the model runs as one of `VARIANTS`; before and after it as it was loaded."""
    restore(subject.model)
    try:
        if variant == "inductor":
            subject.model.compile(dynamic=True)
        elif variant != "eager":
            options: dict[str, Any] = {**subject.options, "exact": True} if variant == "exact" else subject.options
            api.compile(subject.model, progress=False, **options)
        yield
    finally:
        restore(subject.model)


def restore(model: Any) -> None:
    """Takes away what compiling put on a model, and what was compiled."""
    torch._dynamo.reset()
    model._compiled_call_impl = None
    model.__dict__.pop("generate", None)
    regional.remove(model)
