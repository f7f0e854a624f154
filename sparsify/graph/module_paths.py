"""Path of a module within the compiled model, from the expression by which Dynamo reached it.

Dynamo names a module by how the compiled frame got hold of it: `L['self'].model.layers.0`, `L['args'][0].model.layers.0` behind a
decorator, `L['fn'].__self__.model.layers.0` through a bound method. The path starts at the first module of that chain, which only the
frame's values can tell; without them, the parts that cannot be submodules are left out.
"""

from __future__ import annotations

import ast
import contextvars
import re
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

# wrappers that leave their own attribute out of the names of parameters, as torch.distributed.checkpoint does
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# steps from an object to another form of it, or into its registry
_PLUMBING = {"_modules", "cell_contents", "", *_WRAPPERS}

# read from left to right, nested calls such as dict.__getitem__(list.__getitem__(L['models'], 0).blocks, 'a') give their steps in order
_TOKENS = re.compile(
    r"""
      (?P<scope>[A-Z_]+)\[(?P<quote>['"])(?P<name>.*?)(?P=quote)\]      # L['x'] is a local, G['x'] a global
    | (?<![\w.\])])[\w.]+\(                                             # a call's beginning
    | ,\ *(?P<argument>'[^']*'|"[^"]*"|[^()'"]*)\)                      # and its second argument
    | \[(?P<item>'[^']*'|"[^"]*"|[^\]]*)\]
    | \.(?P<attribute>\w+)(?!\w*\()
    | (?P<call>\(\))
    | \A(?P<bare>\w+)
    """,
    re.VERBOSE,
)

Step = tuple[str, Any]

_base: contextvars.ContextVar[str] = contextvars.ContextVar("sparsify_base_path", default="")


@contextmanager
def outermost_module(path: str) -> Generator[None]:
    """In this block a graph's outermost module lies at `path` in a larger model, and module paths begin with that."""
    token = _base.set(path)
    try:
        yield
    finally:
        _base.reset(token)


def layer_number(path: str) -> int | None:
    """The last integer of a path, None without one."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return numbers[-1] if numbers else None


def module_path(source: str, scopes: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Path of a module from the outermost module that its source expression passes through, or from `outermost_module`; "" for itself.

    Args:
        source: an entry of `nn_module_stack`, such as `L['args'][0].model.layers.0`.
        scopes: the compiled frame's locals under "L" and globals under "G", for sources that start there.
    """
    (scope, name), *steps = [*_steps(source)] or [("", "self")]
    values = (scopes or {}).get(scope, {})
    path = _path_through_modules(values[name], steps) if name in values else None
    if path is None:
        path = _without_plumbing(bool(scope), steps)
        if not scope and name not in ("self", "L__self__"):
            path.insert(0, name)
    return ".".join(map(str, [_base.get(), *path] if _base.get() else path))


def _steps(source: str) -> Iterator[Step]:
    """Splits a source expression into its start, ("L", "self"), and steps: ("attribute", "model"), ("item", 0), ("call", "")."""
    for token in _TOKENS.finditer(source):
        if token["scope"]:
            yield token["scope"], token["name"]
        elif token["bare"]:
            yield "", token["bare"]
        elif token["attribute"]:
            yield "attribute", token["attribute"]
        elif token["call"]:
            yield "call", ""
        elif key := token["item"] or token["argument"]:
            constant = key.lstrip("-").isdigit() or key[0] in "'\""
            yield "item", ast.literal_eval(key) if constant else key


def _is_plumbing(key: Any) -> bool:
    return key in _PLUMBING or (isinstance(key, str) and key.startswith("__") and key.endswith("__"))


def _without_plumbing(rooted: bool, steps: list[Step]) -> list[Any]:
    path, container = [], rooted  # an item of `args`, `kwargs` or a closure is no submodule's name
    for kind, key in steps:
        if _is_plumbing(key):
            container = key != "_modules"
        elif not (container and kind == "item"):
            path.append(key)
            container = False
    return path


def _path_through_modules(value: Any, steps: list[Step]) -> list[Any] | None:
    """Names of the steps after the first module that the steps pass through; None when they pass through none.

    A step back to an earlier module removes the detour: `self._old_forward.__self__` is `self`.
    """
    path: list[Any] = []
    passed: list[tuple[nn.Module, int]] = []  # modules on the way, with the lengths of their paths
    for kind, key in [("call", ""), *steps]:
        wraps = isinstance(value, nn.DataParallel | nn.parallel.DistributedDataParallel) and key == "module"
        if passed and not wraps and not _is_plumbing(key):
            path.append(key)
        value = _next_value(value, kind, key)
        if isinstance(value, nn.Module):
            known = [i for i, (module, _) in enumerate(passed) if module is value]
            if known:
                del path[passed[known[0]][1] :], passed[known[0] + 1 :]
            else:
                passed.append((value, len(path)))
    return path if passed else None


def _next_value(value: Any, kind: str, key: Any) -> Any:
    """Value after one step; None where it is unknown."""
    if kind == "call":
        return value() if isinstance(value, weakref.ref) else value
    if isinstance(value, nn.Module) and key in value._modules:
        return value._modules[key]
    for take in (getattr, lambda v, k: v[k]) if kind == "attribute" else (lambda v, k: v[k], getattr):
        try:
            return take(value, key)
        except Exception:  # any object's own code may run here, and a name is not worth a failure
            continue
    return None
