"""Cuts out a site's region: the part of a graph that computes the site's output from its operands, as a graph that can be executed alone.

The inputs of a region are the site's operands (query, key, value, weights ...), the graph's inputs, and sizes. It holds all nodes between
these and the output, the mask's whole subgraph included, and every call that writes to memory which the region reads, in the graph's
order. Views that share memory in the graph share it when the region runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from sparsify.graph.aliasing import Memory, written

# A larger region contains parts of the model, because the model computes its mask. The tensors of the mask's clauses then become inputs.
MOST_NODES = 400
# Calls that change the dtype of the calls after them.
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_IN_PLACE_DRAWS = {"uniform_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_"}
_NOT_OF_A_KIND = {"name", "layer", "index", "count", "covered"}
# Operands that the region computes itself, so that a wrongly matched one is found.
_MADE_IN_REGION = {"sink_logits", "alibi_slopes", "bias", "output", "mask_node", "mask", "source", "product", "covered"}
_NOT_OPERANDS = {"output", "mask_node", "mask", "source", "product", "covered"}


class RegionError(Exception):
    """A region cannot be cut out of its graph; the message says why."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A site in a graph of its own.

    graph: placeholders for the region's inputs, then its nodes in the original order; no output node.
    site: the site with its nodes replaced by those of `graph`.
    """

    graph: fx.Graph
    site: Any


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes in a record or container of records."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from nodes_in(part)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from nodes_in(getattr(value, part.name))


class Regions:
    """Cuts regions out of one graph."""

    def __init__(self, graph: fx.Graph):
        self.memory = Memory(graph)
        self.order = self.memory.position
        self.modes = [node for node in graph.nodes if node.target in AUTOCAST]
        self.writers = [(node, target) for node in graph.nodes for target in written(node)]
        self._writing = {writer for writer, _ in self.writers}

    def cut(self, site: Any) -> tuple[list[fx.Node], set[fx.Node]]:
        """Finds a site's region.

        Returns:
            its nodes, operands first and the others in the graph's order; and those of them whose value is an input of the region although
            the graph computes it.

        Raises:
            RegionError: more than MOST_NODES nodes, even with the tensors of the mask's clauses as inputs.
        """
        operands = _operands(site)
        streams = {n for f in dataclasses.fields(site) if f.name not in _MADE_IN_REGION for n in nodes_in(getattr(site, f.name))}
        leaves = set(nodes_in(getattr(site, "mask", ())))
        for begins, cut_writes in ((streams, False), (streams, True), ({*operands, *leaves}, True)):
            found = self._closure(site.output, begins - {site.output}, {*operands, *leaves}, cut_writes)
            if found is not None:
                nodes, given = found
                nodes |= {node for node in self.modes if self.order[node] < self.order[site.output]}
                first = [n for n in dict.fromkeys(operands) if n in given]
                return first + sorted(nodes - set(first), key=self.order.__getitem__), given
        raise RegionError(f"it takes more than {MOST_NODES} nodes to compute its mask")

    def _closure(
        self, output: fx.Node, begins: set[fx.Node], more: Iterable[fx.Node], cut_writes: bool
    ) -> tuple[set[fx.Node], set[fx.Node]] | None:
        found: set[fx.Node] = set()
        pending = [output, *begins, *more]
        while pending:
            while pending:
                node = pending.pop()
                if node in found:
                    continue
                found.add(node)
                if len(found) > MOST_NODES:
                    return None
                if node is output or not self.begins_at(node, begins):
                    pending += node.all_input_nodes
            writers = [n for n in self._writers_to(found, begins, output) if n not in found]
            held = {s for n in found for s in self.memory.storages(n)}
            for writer in writers if cut_writes else ():
                # what is written is given; where it is written belongs to the region
                begins = begins | {n for n in writer.all_input_nodes if not held & set(self.memory.storages(n))}
            pending = writers
        return found, begins & found

    def begins_at(self, node: fx.Node, begins: set[fx.Node]) -> bool:
        """Whether the node's value is an input of a region: operands, inputs of the graph, and everything that is no tensor."""
        value = node.meta.get("example_value")
        if node.target in AUTOCAST:
            return False
        if node in self._writing:  # `x[i] = y` has no value of its own; `x *= y` has
            return node in begins and isinstance(value, torch.Tensor)
        return node in begins or node.op in ("placeholder", "get_attr") or not isinstance(value, (torch.Tensor, tuple, list))

    def _writers_to(self, found: set[fx.Node], begins: set[fx.Node], output: fx.Node) -> list[fx.Node]:
        """Calls before the output that write to memory which the region reads; for an operand only those after its first reader."""
        since: dict[Any, int] = {}
        for node in found:
            start = self.order[node]
            if node in begins:
                start = min((self.order[user] for user in node.users if user in found), default=self.order[output])
            for storage in self.memory.storages(node):
                since[storage] = min(start, since.get(storage, start))
        end = self.order[output]
        return [
            writer
            for writer, target in self.writers
            if self.order[writer] < end and any(self.order[writer] > since.get(s, end) for s in self.memory.storages(target))
        ]

    def kind(self, site: Any, nodes: list[fx.Node], given: set[fx.Node], also: object) -> str:
        """A text that is equal for two sites whose regions do the same with inputs of the same dtypes, sizes and strides.

        Args:
            also: further properties that must be equal, such as the method.
        """
        number = {node: i for i, node in enumerate(nodes)}
        storages: dict[Any, int] = {}
        symbols: dict[str, str] = {}  # layers differ in the symbols of their cached keys
        names = re.compile(r"\b[suz][a-z]*\d+\b")
        lines = [str(also)]
        for node in nodes:
            value = node.meta.get("example_value")
            described = names.sub(lambda m: symbols.setdefault(m[0], f"s{len(symbols)}"), description(value))
            shared = [storages.setdefault(s, len(storages)) for s in self.memory.storages(node)]
            inside = all(n in number for n in node.all_input_nodes) and not self.begins_at(node, given)
            arguments = map_arg((node.args, node.kwargs), lambda n: cast(Any, Numbered(number[n]))) if inside else None
            call = (node.op, node.target, arguments) if inside else "given"
            lines.append(f"{described} {shared} {call}")
        told = [f.name for f in dataclasses.fields(site) if f.name not in _NOT_OF_A_KIND]
        lines += [f"{name}: {_shown(getattr(site, name), number)}" for name in told]
        return names.sub(lambda m: symbols.get(m[0], m[0]), "\n".join(lines))

    def region(self, site: Any, nodes: list[fx.Node], given: set[fx.Node]) -> Region:
        """Copies a region into a graph of its own.

        Raises:
            RegionError: a call draws random numbers, or writes to memory from outside of the region.
        """
        members = set(nodes)
        graph, mapping = fx.Graph(), {}
        for node in nodes:
            cut = any(n not in members for n in node.all_input_nodes)
            if cut and node in self._writing and node not in given:
                raise RegionError(f"{node.name} writes what is made outside of the region")
            if _draws_random(node):
                raise RegionError(f"{node.name} draws random numbers")
            if cut or self.begins_at(node, given):
                copy = graph.placeholder(node.name)
                copy.meta = dict(node.meta)
            else:
                copy = graph.node_copy(node, mapping.__getitem__)
            mapping[node] = copy
        return Region(graph, dataclasses.replace(site, covered=()).mapped(mapping))


def _operands(site: Any) -> list[fx.Node]:
    return [n for f in dataclasses.fields(site) if f.name not in _NOT_OPERANDS for n in nodes_in(getattr(site, f.name))]


def _draws_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers; run here, it would advance the caller's generator."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if "dropout" in name:
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        return bool(given.get("p", 0.5) != 0) and given.get("training", given.get("train", True)) is not False
    return name.startswith(("rand", "bernoulli", "multinomial", "normal", "poisson")) or name in _IN_PLACE_DRAWS


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A node in the description of a graph, by its place."""

    number: int

    def __repr__(self) -> str:
        return f"%{self.number}"


def description(value: Any) -> str:
    """A value as far as code that is made for it depends on it: dtype, device, shape and strides of a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return str(value)


def _shown(value: Any, number: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}" if value in number else "outside"
    if isinstance(value, tuple):
        return str([_shown(v, number) for v in value])
    if dataclasses.is_dataclass(value):
        return str([_shown(getattr(value, f.name), number) for f in dataclasses.fields(value)])
    return str(value)
