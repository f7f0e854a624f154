"""Who imports whom: no cycle, lazy and type-checking imports included; methods import the method's module and ops alone; what a site is,
only matching asks."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITES = {"Site", "SiteOverKeys", "AttentionSite", "CacheSite", "FeedForwardSite"}


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, prefix in (("sparsify", "sparsify"), ("passes", "sparsify.passes"), ("backends", "sparsify.backends")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "sparsify" and parts[0] in ("passes", "backends"):
                continue  # links to the folders beside it
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module's text imports, wherever it does: in functions, for type checkers, by `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in whole if name in known)
            if any(name not in known for name in whole):
                yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            name = node.args[0]
            if isinstance(name, ast.Constant) and name.value in known:
                yield name.value


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []
    numbers = itertools.count()

    def visit(name: str) -> None:
        index[name] = low[name] = next(numbers)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1 or name in graph[name]:
                found.append(sorted(members))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def imports() -> dict[str, set[str]]:
    found = sources()
    return {name: {*imported(ast.parse(path.read_text()), set(found))} - {name} for name, path in found.items()}


def test_no_two_modules_import_each_other_not_even_lazily():
    found = cycles(imports())
    assert not found, "\n".join(" ↔ ".join(members) for members in found)


def test_hidden_cycles_are_found():
    lazy = ast.parse("def f():\n    from sparsify import b\n")
    typed = ast.parse("if TYPE_CHECKING:\n    from sparsify.a import A\n")
    named = ast.parse("import importlib\nimportlib.import_module('sparsify.c')\n")
    known = {"sparsify", "sparsify.a", "sparsify.b", "sparsify.c"}
    assert [*imported(lazy, known), *imported(typed, known), *imported(named, known)] == ["sparsify.b", "sparsify.a", "sparsify.c"]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__"), ids=lambda p: p.stem)
def test_a_method_imports_planning_method_and_ops_alone(path):
    found = {*imported(ast.parse(path.read_text()), set(sources()))}
    others = {name for name in found if name != "sparsify.planning.method" and not name.startswith("sparsify.ops")}
    assert not others


@pytest.mark.parametrize("where", ["planning", "costs", "rewriting", "commands/cost", "pipeline.py"])
def test_nobody_asks_what_kind_of_site_a_site_is(where):
    """Sites answer for themselves: outside of matching, no code depends on the class of one."""
    place = ROOT / "sparsify" / where
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            if isinstance(node, ast.Call) and name in ("isinstance", "issubclass", "type"):
                asked = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} | {
                    one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)
                }
                assert not asked & SITES, f"{path.relative_to(ROOT)}:{node.lineno}"
            if isinstance(node, ast.If | ast.IfExp):
                assert "ffn" not in {one.id for one in ast.walk(node.test) if isinstance(one, ast.Name)}, f"{path}:{node.lineno}"
