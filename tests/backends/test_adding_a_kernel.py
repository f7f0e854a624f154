"""docs/adding-a-kernel.md is followed literally."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from sparsify.backends import attention
from tests.support import pages

PAGE = "adding-a-kernel.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the page's files lie, those of backends/attention as if they lay there."""
    pages.write(PAGE, tmp_path)
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path / "backends" / "attention")])
    importlib.invalidate_caches()
    yield tmp_path
    for name in [*sys.modules]:
        if name.endswith(".causal_rows") or name.startswith("followed_"):
            del sys.modules[name]
    vars(attention).pop("causal_rows", None)


@pytest.mark.interpreter
def test_its_values_and_its_line(folder: Path) -> None:
    module = pages.load(folder / "tests" / "backends" / "attention" / "test_causal_rows_interpreted.py")
    assert len([test() for test in pages.tests(module)]) == 4
    (folder / "dispatch.py").write_text(pages.patched(PAGE, "backends/dispatch.py"))
    table = pages.load(folder / "dispatch.py")
    assert list(table._TABLE["attention"]) == ["hopper", "causal_rows", "triton", "cpp", "reference"]
    plain, windowed = module.make_call(5, 5), module.make_call(5, 5, windows=(3,))
    with table.serving("triton"):
        assert torch.equal(table.serve("attention")(plain)[0], module.causal_rows.attention(plain)[0])
        torch.testing.assert_close(table.serve("attention")(windowed)[0], module.reference.attention(windowed)[0], atol=1e-5, rtol=1e-5)


def test_it_compiles(folder: Path) -> None:
    module = pages.load(folder / "tests" / "backends" / "attention" / "test_causal_rows_compiles.py")
    assert len([test() for test in pages.tests(module)]) == 1
