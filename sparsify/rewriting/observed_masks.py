"""Puts what a mask from outside was observed to say in the place of the mask, and cuts out what compares the two on every call.

The mask's own values are the proof: where they equal what was put in their place, the changed graph computes what the graph itself
computes, whoever made the mask and whatever happened to it since.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from sparsify.graph.aliasing import Memory, example_tensor, written
from sparsify.graph.compat import symbol_values
from sparsify.masks import observed
from sparsify.masks.observed import Constant, Observed, Visibility
from sparsify.masks.symbolic import find_shape_env
from sparsify.matching.attention import find_attention
from sparsify.matching.biases import NUMBERS
from sparsify.matching.sites import AttentionSite
from sparsify.rewriting.copies import copy_graph
from sparsify.rewriting.editor import Editor, values

T = TypeVar("T")
log = logging.getLogger(__name__)

LOOKED_AT = "looked at on every call"  # of a plan's masks


@dataclass(frozen=True)
class Assumption:
    """A graph under the assumption that its masks say what they were observed to say.

    graph: a copy of the graph in which the masks are made from what they say.
    check: a graph [] bool: whether the assumption holds.
    places: which inputs of the graph `check` takes, in order.
    attention: what `find_attention` finds in `graph`.
    counting: which of these were not described without the assumption, by index.
    """

    graph: fx.GraphModule
    check: fx.GraphModule
    places: tuple[int, ...]
    attention: list[AttentionSite] = field(default_factory=list)
    counting: tuple[int, ...] = ()


def find(
    gm: fx.GraphModule, attention: list[AttentionSite], example_inputs: Sequence[Any]
) -> tuple[Assumption | None, list[AttentionSite]]:
    """The assumption that lets most sites be described, None where none does. It holds for the example inputs.

    Args:
        gm: the graph, which stays as it is.
        attention: what `find_attention` finds in it.
        example_inputs: its inputs.

    Returns:
        the assumption, and the sites of the graph itself: those that no assumption describes say what is in the way under it.
    """
    attention = with_biases(gm, attention, example_inputs)
    nodes = candidates(attention)
    forms = observe(gm, nodes, example_inputs) if nodes else {}
    masks = {node: form for node, form in forms.items() if isinstance(form, Visibility)}
    best, told = None, attention
    for some in dict.fromkeys(tuple(one) for one in (masks, forms) if one):
        mapping: dict[fx.Node, fx.Node] = {}
        copy = copy_graph(gm, mapping)
        found = assume(copy, mapping, {node: forms[node] for node in some})
        sites = find_attention(copy)
        counting = tuple(i for i, (old, new) in enumerate(zip(attention, sites, strict=True)) if old.mask.opaque and not new.mask.opaque)
        if len(counting) > (0 if best is None else len(best.counting)):
            best = dataclasses.replace(found, attention=sites, counting=counting)
            log.info("%d masks are looked at on every call: %s", len(some), "; ".join(dict.fromkeys(_words(forms[node]) for node in some)))
        told = [_told(old, new) for old, new in zip(told, sites, strict=True)]
    return best, told


def _told(old: AttentionSite, new: AttentionSite) -> AttentionSite:
    """A site that is described neither by its graph nor under an assumption, with both reasons."""
    why = new.near_miss or new.mask.reason
    if not (old.mask.opaque and new.mask.opaque) or why in (old.near_miss or old.mask.reason):
        return old
    return tell(old, why)


def tell(old: AttentionSite, why: str) -> AttentionSite:
    """A site that stays as it is, with what is in its way where its masks are read by their values."""
    reason = f"{old.near_miss or old.mask.reason}, and read by its values: {why}"
    mask = dataclasses.replace(old.mask, reason=reason)
    return dataclasses.replace(old, mask=mask, near_miss=reason if old.near_miss else "")


def candidates(sites: Iterable[AttentionSite]) -> list[fx.Node]:
    """Inputs of the graph, or views of them, that masks are made from which could not be proved, and factors of scores that stand for
    masks. A mask of one row is left alone: it would be compared for every token."""
    opaque = [site for site in sites if site.mask.opaque and site.query_len != 1]
    return list(dict.fromkeys(node for site in opaque for node in site.mask.inputs))


def with_biases(gm: fx.GraphModule, attention: list[AttentionSite], example_inputs: Sequence[Any]) -> list[AttentionSite]:
    """The sites where inputs that hold more numbers than a mask are biases. Nothing is assumed by that: added as they are, they need not be
    of any form in calls to come."""
    found = _of_values(gm, candidates(attention), example_inputs, observed.is_bias)
    for node, biased in found.items():
        if biased:
            node.meta[NUMBERS] = True
    return find_attention(gm) if any(found.values()) else attention


def observe(gm: fx.GraphModule, nodes: Sequence[fx.Node], example_inputs: Sequence[Any]) -> dict[fx.Node, Observed]:
    """What each of the nodes says in the example inputs, where these are real and it has a known form.

    Args:
        nodes: as `candidates` gives them.
    """
    forms = _of_values(gm, nodes, example_inputs, observed.observe)
    return {node: form for node, form in forms.items() if form is not None}


def _of_values(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], example_inputs: Sequence[Any], told: Callable[[torch.Tensor], T]
) -> dict[fx.Node, T]:
    """What is told of the nodes that have a real value in the example inputs and are written nowhere."""
    if not nodes:
        return {}
    memory, found = Memory(gm.graph), dict[fx.Node, T]()
    changed = {s for node in gm.graph.nodes for target in written(node) for s in memory.storages(target)}
    with _disable_current_modes(), torch.no_grad():
        example = _Example(gm, example_inputs)
        for node in nodes:
            if changed & set(memory.storages(node)):
                continue
            if (value := example.value(node)) is not None:
                found[node] = told(value)
    return found


class _Example:
    """Values of nodes in the example inputs."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]):
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._known: dict[fx.Node, Any] = dict(zip(inputs, example_inputs, strict=True))
        self._env = find_shape_env(gm.graph)

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """A real tensor; None where there is none."""
        needed = _closure([node])
        if any(isinstance(self._known.get(n), FakeTensor) or n.op == "get_attr" for n in needed):
            return None
        for one in needed:
            self._known[one] = self._number(self._known[one]) if one in self._known else self._run(one)
        value = self._known[node]
        return value if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type != "meta" else None

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self._known.__getitem__)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _number(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        known = symbol_values(self._env) if self._env is not None else {}
        return int(value.node.expr.xreplace({symbol: int(known[symbol]) for symbol in value.node.expr.free_symbols}))


def assume(gm: fx.GraphModule, mapping: dict[fx.Node, fx.Node], forms: dict[fx.Node, Observed]) -> Assumption:
    """Puts what was observed in the place of the masks.

    Args:
        gm: a copy of the graph, which is changed.
        mapping: sends the graph's own nodes to the copy's.
        forms: what the graph's own nodes say.
    """
    editor = Editor(gm.graph)
    equal = []
    for node, form in sorted(((mapping[node], form) for node, form in forms.items()), key=operator.itemgetter(0)):
        readers = [user for user in node.users if user.op != "output" and not _shares_memory(user, node)]
        editor.move_after(node)
        said = _made(editor, node, form)
        equal.append(editor.method("all", editor.call(operator.eq, node, said)))
        for reader in readers:
            reader.replace_input_with(node, said)
    editor.move_after(max(equal))  # what is made of inputs stands behind all inputs, the last first
    agree = functools.reduce(lambda one, other: editor.call(operator.and_, one, other), equal)
    check, places = _cut(gm, agree)
    for node in reversed(_closure([agree])):
        if node.op != "placeholder" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return Assumption(gm, check, places)


def _shares_memory(node: fx.Node, other: fx.Node) -> bool:
    return bool(set(Memory.storages(node)) & set(Memory.storages(other)))


def _words(form: Observed) -> str:
    return f"all {form.number}" if isinstance(form, Constant) else form.describe()


def _made(editor: Editor, node: fx.Node, form: Observed) -> fx.Node:
    """A tensor like the node's, made from what it says."""
    tensor = example_tensor(node)
    number = lambda value: editor.call(torch.full, (), value, dtype=tensor.dtype, device=tensor.device)
    if isinstance(form, Constant):
        return editor.method("expand_as", number(form.number), node)
    shown = _visible(editor, node, form)
    if form.shown is False:
        shown = editor.call(torch.logical_not, shown)
    elif form.shown is not True:
        shown = editor.call(torch.where, shown, number(form.shown), number(form.hidden))
    return editor.method("expand_as", shown, node)


def _visible(editor: Editor, node: fx.Node, form: Visibility) -> fx.Node:
    call: Callable[..., Any] = lambda function, *args, **kwargs: _computed(editor, function, args, kwargs)
    lengths = editor.length(node, -2), editor.length(node, -1)
    return observed.visible(form, node, lengths, values(node).device, call)


def _computed(editor: Editor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A node of the call; its result where nothing of it is in the graph."""
    if function in (operator.add, operator.sub) and not any(isinstance(arg, fx.Node) for arg in args):
        return function(*args, **kwargs)
    return editor.call(function, *args, **kwargs)


def _cut(gm: fx.GraphModule, result: fx.Node) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """What computes a node, as a graph of its own, and which inputs of the graph it takes: all sizes, and the tensors that it reads."""
    needed = set(_closure([result]))
    graph, copies = fx.Graph(), {}
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    taken = [i for i, node in enumerate(inputs) if node in needed or isinstance(node.meta.get("example_value"), torch.SymInt)]
    for node in [inputs[i] for i in taken] + [node for node in gm.graph.nodes if node in needed and node.op != "placeholder"]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[result],))
    return fx.GraphModule(gm, graph), tuple(taken)


def _closure(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they are computed from, in the graph's order."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found)
