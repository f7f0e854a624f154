"""The house itself: layers, packaging, discovery, a test and a docs row for every method."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from sparsify.errors import ConfigError
from sparsify.planning.method import Pass
from sparsify.planning.registry import discover
from tests.support import samples

ROOT = Path(__file__).parent.parent


def modules() -> set[str]:
    found = {f"sparsify/{p.relative_to(ROOT / 'sparsify')}" for p in (ROOT / "sparsify").rglob("*.py")}
    for folder in ("passes", "backends"):
        found |= {f"sparsify/{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
    return found


def data_files() -> set[str]:
    """What is no code and is read at run time: profiles, templates."""
    tracked = subprocess.run(["git", "ls-files", "sparsify", "passes", "backends"], cwd=ROOT, capture_output=True, text=True).stdout
    files = {name for name in tracked.splitlines() if "." in Path(name).name and not name.endswith(".py")}
    return {name if name.startswith("sparsify/") else f"sparsify/{name}" for name in files}


def test_layers_point_one_way():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_has_every_module(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("sparsify_compiler-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules() - names == set()
    assert data_files() - names == set()
    assert not any(n.startswith(("tests/", "benchmarks/", "passes/", "backends/")) for n in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "sparsify = sparsify_entry:backend" in entry_points


def test_torch_lists_the_backend():
    assert "sparsify" in torch._dynamo.list_backends()


@pytest.mark.parametrize("foreign", ["", "__distribution__ = 'another'", "from sparsify.backend import sparsify"])
@pytest.mark.samples(1)
def test_a_foreign_package_of_our_name_is_told(tmp_path, foreign):
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "__init__.py").write_text(foreign)
    (tmp_path / "sparsify" / "backend.py").write_text("def sparsify(*args): raise AssertionError")
    code = f"""if True:
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
        import sparsify_entry
        for entry in (sparsify_entry.main, lambda: sparsify_entry.backend(None, [])):
            try:
                entry()
            except ImportError as error:
                assert "is not sparsify-compiler's" in str(error) and {str(tmp_path)!r} in str(error), error
            else:
                raise AssertionError(entry)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_methods_are_discovered():
    assert {"dense", "sink_window", "xattention"} <= set(discover())


@pytest.mark.parametrize("method", sorted(p.stem for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__"))
def test_every_method_has_a_test_and_a_docs_row(method):
    assert (ROOT / "tests" / "passes" / f"test_{method}.py").exists()
    assert f"`{method}`" in (ROOT / "docs" / "methods.md").read_text()


class _Foreign(Pass):
    name = "foreign"


class _Twin(Pass):
    name = "dense"


def _fake_entry_points(monkeypatch, value):
    class Entry:
        name, value = "x", "pkg:X"

        def load(self):
            return value

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()])
    discover.cache_clear()


def test_other_packages_may_add_methods(monkeypatch):
    _fake_entry_points(monkeypatch, _Foreign)
    try:
        assert discover()["foreign"] is _Foreign
    finally:
        discover.cache_clear()


@pytest.mark.parametrize("value, match", [(_Twin, "two methods"), (int, "not a sparsify Pass")])
def test_a_bad_entry_point_is_refused(monkeypatch, value, match):
    _fake_entry_points(monkeypatch, value)
    try:
        with pytest.raises(ConfigError, match=match):
            discover()
    finally:
        discover.cache_clear()


def test_importing_sparsify_is_cheap():
    code = "import sys, sparsify; sys.exit('transformers' in sys.modules or 'triton' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_layout_page_names_every_folder_and_layer():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert {folder for folder in folders if f"`{folder}/`" not in page.split("### Layers")[0]} == set()
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = [
        line.split("|")[1].replace("`", "").strip() for line in page.split("| layer | says |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    ]
    assert rows == [layer.replace(" | ", ", ") for layer in contract["layers"]]


def test_pre_commit_runs_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    assert [hook["entry"] for hook in hooks] == [
        line.strip().replace("$(BIN)/python", ".venv/bin/python").removeprefix("$(BIN)/") for line in recipe
    ]


class Case:
    """As much of a collected test as `samples` looks at."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator):
        self.nodeid, self.marks = nodeid, [mark.mark for mark in marks]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


def test_samples_are_quick_and_the_other_cases_slow():
    sampled, slow = pytest.mark.samples(2), pytest.mark.slow
    many = [
        Case("many[0]", sampled),
        Case("many[1]", sampled),
        Case("many[2]", sampled, slow),
        Case("many[3]", sampled),
        Case("many[4]", sampled),
    ]
    others = [Case("few[0]", sampled), Case("plain[0]"), Case("plain[1]"), Case("plain[2]")]
    samples.pytest_collection_modifyitems([*many, *others])
    assert [case.nodeid for case in many if not case.get_closest_marker("slow")] == ["many[0]", "many[3]"]
    assert not any(case.get_closest_marker("slow") for case in others)
