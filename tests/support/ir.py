"""The part of a graph that a pass changed, as text, for goldens."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import fx

from sparsify import pipeline
from sparsify.planning.plan import Plan

GOLDENS = Path(__file__).parents[1] / "goldens" / "ir"


def rewritten_graph(function, inputs: tuple, options: dict) -> tuple[fx.GraphModule, fx.GraphModule, Plan]:
    """(graph before, graph after, plan) of the one graph that compiling `function(*inputs)` makes."""
    from sparsify.planning import registry
    from sparsify.planning.config import config
    from sparsify.rewriting.trace import Trace

    kept = []

    def capture(gm, example_inputs):
        settings = config.load(options, method_models=registry.discover(), environ={})
        plan, after, _ = pipeline.rewrite_graph(gm, settings, Trace())
        kept.append((pipeline.copy_graph(gm), after, plan))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=capture, fullgraph=True)(*inputs)
    (result,) = kept
    return result


def changed_region(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """Lines of the graph's text that only one side has, `-` and `+`, with a stable naming."""
    old, new = (_lines(gm) for gm in (before, after))
    removed = [f"- {line}" for line in old if line not in new]
    added = [f"+ {line}" for line in new if line not in old]
    return "\n".join(removed + added) + "\n"


def _lines(gm: fx.GraphModule) -> list[str]:
    lines = []
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            value = node.meta.get("example_value")
            shape = f" {str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items() if v is not None]
            lines.append(f"{node.name}{shape} = {target}({', '.join(arguments)})")
    return lines


def check_golden(name: str, text: str) -> None:
    """Compares with tests/goldens/ir/NAME.txt; SPARSIFY_ACCEPT=1 writes it."""
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("SPARSIFY_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text
