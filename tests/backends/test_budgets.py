"""The budgets of generated kernels: what outgrows its own fails, and so does what has none."""

from __future__ import annotations

import json

import pytest

from tests.support import offline
from tests.support.offline import Resources, within_budget

triton = pytest.importorskip("triton")


def used(**changes: int) -> Resources:
    return Resources(**{"registers": 100, "spilled": 0, "shared": 1000, "wgmma": 0, "mma": 0, "cp_async": 0, **changes})


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSIFY_ACCEPT", raising=False)
    monkeypatch.setattr(offline, "BUDGETS", tmp_path)
    return tmp_path


def write(book, release: str) -> None:
    (book / f"{release}.json").write_text(json.dumps({"a": {"registers": 100, "spilled": 0, "shared": 1000}}))


@pytest.mark.parametrize("more", [{"registers": 101}, {"spilled": 8}, {"shared": 1001}])
def test_more_than_the_budget_fails(book, more):
    write(book, triton.__version__)
    within_budget("a", used())
    within_budget("a", used(registers=90))
    with pytest.raises(AssertionError, match=next(iter(more))):
        within_budget("a", used(**more))


def test_a_kernel_without_a_budget_fails(book):
    write(book, triton.__version__)
    with pytest.raises(AssertionError, match="no budget"):
        within_budget("b", used())


def test_another_compiler_is_not_compared(book):
    write(book, "0.0")
    within_budget("a", used(registers=255))


def test_accepting_writes_the_book(book, monkeypatch):
    write(book, triton.__version__)
    monkeypatch.setenv("SPARSIFY_ACCEPT", "1")
    within_budget("b", used(shared=7))
    within_budget("a", used(registers=120))
    monkeypatch.delenv("SPARSIFY_ACCEPT")
    within_budget("a", used(registers=120))
    assert json.loads((book / f"{triton.__version__}.json").read_text())["b"]["shared"] == 7
