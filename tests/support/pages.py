"""Follows a page of docs/ literally: its code blocks that begin with a path are files, and are found where they would be."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```\w*\n(?:# (\S+)|<!-- (\S+) -->)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files(page: str) -> dict[str, str]:
    """The text of each block of a page that begins with a path, by path."""
    found: dict[str, str] = {}
    for path, comment, text in _BLOCK.findall((DOCS / page).read_text()):
        found[path or comment] = text
    return found


def patched(page: str, path: str) -> str:
    """A file of the repository with what the page's block adds: lines with `+`, between lines that are there, in this order."""
    lines = (DOCS.parent / path).read_text().splitlines()
    at = 0
    for line in files(page)[path].splitlines():
        if line.startswith("+"):
            lines.insert(at, line[1:])
            at += 1
        else:
            at = lines.index(line[1:], at) + 1
    return "\n".join(lines) + "\n"


def write(page: str, folder: Path) -> None:
    """Writes a page's files below a folder."""
    for path, text in files(page).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def install(page: str, folder: Path) -> None:
    """Makes `my_package` of a page's files, installed with the entry points of the page's pyproject.toml. `folder` is to be on sys.path."""
    package, information = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir()
    information.mkdir()
    for path, text in files(page).items():
        if path.endswith(".py") and not path.startswith("tests/"):
            (package / Path(path).name).write_text(text)
    (package / "__init__.py").touch()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = tomllib.loads(files(page)["pyproject.toml"])["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()) for group, found in points.items()]
    (information / "entry_points.txt").write_text("\n".join(lines))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"followed_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tests(module: ModuleType) -> Iterator[Callable[[], Any]]:
    """Its tests without fixtures, each with the arguments of its marks."""
    for name, test in list(vars(module).items()):
        if name.startswith("test_"):
            given = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
            for values in itertools.product(*(choices for _, choices in given)):
                arguments: dict[str, Any] = {}
                for (names, _), value in zip(given, values, strict=True):
                    arguments |= dict(zip(names.split(", "), value, strict=True)) if "," in names else {names: value}
                yield lambda test=test, arguments=arguments: test(**arguments)
