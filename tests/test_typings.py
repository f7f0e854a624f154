"""The stubs in tools/typings say nothing that the installed packages lack."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tools" / "typings"
# what stands in `_declared` is checked where a stub exports it
STUBS = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.pyi")) if path.name != "_declared.pyi"]


def _named(body):
    """Statements of a stub's module or class by the name that they declare."""
    for statement in body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            yield statement.name, statement
        elif isinstance(statement, ast.AnnAssign):
            yield statement.target.id, statement
        elif isinstance(statement, ast.Assign):
            yield statement.targets[0].id, statement


@pytest.mark.parametrize("stub", STUBS, ids=str)
def test_what_a_stub_exports_exists(stub):
    module = importlib.import_module(".".join(stub.with_suffix("").parts).removesuffix(".__init__"))
    declared = dict(_named(ast.parse((ROOT / stub.parts[0] / "_declared.pyi").read_text()).body))
    exports = [statement for statement in ast.parse((ROOT / stub).read_text()).body if isinstance(statement, ast.ImportFrom)]
    for name in (alias.name for statement in exports for alias in statement.names):
        found, statement = getattr(module, name), declared[name]
        if isinstance(statement, ast.FunctionDef):
            arguments = {argument.arg for argument in [*statement.args.args, *statement.args.kwonlyargs]}
            assert arguments <= set(inspect.signature(found).parameters), name
        elif isinstance(statement, ast.ClassDef):
            assert {base.id for base in statement.bases} <= {base.__name__ for base in found.__mro__}, name
            assert [member for member, _ in _named(statement.body) if not hasattr(found, member)] == [], name
