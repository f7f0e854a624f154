"""The pages that say how to add something are followed literally."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import sparsify.passes
from sparsify import policies
from sparsify.planning import registry
from tests.support import pages


@pytest.fixture(autouse=True)
def forgotten():
    """What was discovered here is not known elsewhere."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("sparsify.passes.", "sparsify.policies.", "my_package", "followed_")):
            del sys.modules[name]
    for found in (registry.discover, policies.discover, policies.parse):
        found.cache_clear()


def extend(monkeypatch: pytest.MonkeyPatch, package, folder: Path) -> None:
    """As if the files of `folder` lay in the package's."""
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    for found in (registry.discover, policies.discover):
        found.cache_clear()


def test_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.write("adding-a-method.md", tmp_path)
    extend(monkeypatch, sparsify.passes, tmp_path / "passes")
    assert registry.discover()["recent"].__module__ == "sparsify.passes.recent"
    ran = [test() for test in pages.tests(pages.load(tmp_path / "tests" / "passes" / "test_recent.py"))]
    assert len(ran) == 4
    row = (tmp_path / "docs" / "methods.md").read_text().strip()
    header = (pages.DOCS / "methods.md").read_text().split("\n|")[1]
    assert row.startswith("| `recent` |") and row.count("|") == header.count("|") + 1


def test_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.write("adding-a-policy.md", tmp_path)
    extend(monkeypatch, policies, tmp_path / "sparsify" / "policies")
    assert policies.discover()["key_norm"].__module__ == "sparsify.policies.key_norm"
    ran = [test() for test in pages.tests(pages.load(tmp_path / "tests" / "policies" / "test_key_norm.py"))]
    assert len(ran) == 3


@pytest.mark.parametrize(
    "page, name, discover", [("adding-a-method.md", "recent", registry.discover), ("adding-a-policy.md", "key_norm", policies.discover)]
)
def test_in_a_package_of_your_own(page: str, name: str, discover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.install(page, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    discover.cache_clear()
    assert discover()[name].__module__ == f"my_package.{name}"


def test_a_method_imports_what_its_page_says() -> None:
    imports = [
        line for line in pages.files("adding-a-method.md")["passes/recent.py"].splitlines() if "sparsify" in line and "import" in line
    ]
    assert len(imports) == 1 and imports[0].startswith("from sparsify.planning.method import ")
