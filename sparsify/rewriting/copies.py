"""Copies a graph so that it can be changed."""

from __future__ import annotations

from torch import fx


def copy_graph(gm: fx.GraphModule, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.GraphModule:
    """A copy of the graph with its metadata, over the same parameters and attributes.

    Args:
        mapping: filled with old node -> new node.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    values = mapping if mapping is not None else {}
    result = graph.graph_copy(gm.graph, values)
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    output = graph.output(result)
    output.meta = dict(old_output.meta)
    graph._codegen = gm.graph._codegen
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    _keep_sources(gm, copy, values)
    return copy


def _keep_sources(gm: fx.GraphModule, copy: fx.GraphModule, mapping: dict[fx.Node, fx.Node]) -> None:
    """Copies the attributes in which Dynamo records where inputs came from, and which fx does not copy.

    Without them AOTAutograd treats no input as static: CUDA graphs then copy every weight on every call, and are not used where an input
    such as a cache is mutated. Duplicate inputs would have no guard.
    """
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    for node, twin in mapping.items():
        if node.op == "placeholder" and hasattr(node, "_dynamo_source"):
            setattr(twin, "_dynamo_source", getattr(node, "_dynamo_source"))  # noqa: B009, B010  (no attributes that fx declares)
