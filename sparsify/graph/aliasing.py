"""Which nodes of a Dynamo graph share memory, and which write to it.

A value may be read as a pure function only when no in-place write lies between its computation and its last use. Memory is identified by
the storage of the example values: views share their base's, as they do at run time.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
}


def tensor_of(node: Any) -> torch.Tensor | None:
    """The example value of a node; None when it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def example_tensor(node: Any) -> torch.Tensor:
    """The example value of a node that is known to be a tensor.

    Raises:
        TypeError: it is none.
    """
    if (tensor := tensor_of(node)) is None:
        raise TypeError(f"{node} is no tensor")
    return tensor


def written(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node may write to. Callables that cannot be inspected count as writing to all of their inputs."""
    if node.op == "call_method":
        name = str(node.target)
        in_place = name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__", "__int__"))
        return _first(node) if in_place or (name.endswith("_") and not name.endswith("__")) else []
    if node.op != "call_function":
        return list(node.all_input_nodes) if node.op == "call_module" else []
    target = node.target
    if target is operator.setitem or target in _IN_PLACE_OPERATORS:
        return _first(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes)
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return _written_by_schema(node, schema) if schema.is_mutable else []
    name = str(getattr(target, "__name__", ""))
    out = node.kwargs.get("out")
    if out is not None:
        return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, fx.Node)]
    if (name.endswith("_") and not name.endswith("__") and target not in (operator.and_, operator.or_, operator.not_)) or _inplace_flag(
        node
    ):
        return _first(node)
    return []


def _written_by_schema(node: fx.Node, schema: torch.FunctionSchema) -> list[fx.Node]:
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    marked = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found: list[fx.Node] = []
    map_arg(tuple(given.get(name) for name in marked), lambda n: found.append(n) or n)
    return found


def _first(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args[:1] if isinstance(a, fx.Node)] or list(node.all_input_nodes)


@functools.cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    return signature if "inplace" in signature.parameters else None


def _inplace_flag(node: fx.Node) -> bool:
    signature = _signature(node.target)
    if signature is None:
        return node.kwargs.get("inplace", False) is not False
    try:
        return signature.bind(*node.args, **node.kwargs).arguments.get("inplace", False) is not False
    except TypeError:
        return True


class Memory:
    """Index of a graph's in-place writes by storage.

    position: each node's index in execution order.
    """

    def __init__(self, graph: fx.Graph):
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._born: dict[Any, int] = {}
        self._writes: dict[Any, list[int]] = defaultdict(list)
        for node, i in self.position.items():
            for storage in self.storages(node):
                self._born.setdefault(storage, i)
            for target in written(node):
                for storage in self.storages(target):
                    self._writes[storage].append(i)

    @staticmethod
    def storages(node: fx.Node) -> list[Any]:
        """Identities of the storages of a node's tensors."""
        value = node.meta.get("example_value")
        tensors = [t for t in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(t, torch.Tensor)]
        found = []
        for tensor in tensors:
            try:
                found.append(StorageWeakRef(tensor.untyped_storage()))
            except (NotImplementedError, RuntimeError):
                found.append(("node", node))
        return found

    def written_between(self, node: fx.Node, first: fx.Node | None, last: fx.Node) -> bool:
        """Whether the node's memory may be written after `first` (None: after its own computation) and before `last` runs."""
        end = self.position[last]
        for storage in self.storages(node):
            start = self._born.get(storage, -1) if first is None else self.position[first]
            if any(start < i < end for i in self._writes.get(storage, ())):
                return True
        return False

    def written_while_read(self, nodes: Iterable[fx.Node], reader: fx.Node) -> fx.Node | None:
        """A node of a subgraph whose memory is written before the subgraph's last use of it; None without one.

        Args:
            nodes: the subgraph.
            reader: the node that consumes it.
        """
        members = set(nodes) | {reader}
        for node in members - {reader}:
            for user in node.users:
                if user in members and self.written_between(node, None, user):
                    return node
        return None
