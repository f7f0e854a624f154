"""Every cell of the family matrix, every third family once in the quick run. SHARD=i/n (i from 1) keeps one n-th of the slow cells.

Slow cells that passed with these very sources are skipped: the journal makes an interrupted `make test-all` resume.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
import transformers

from sparsify.rewriting import observed_masks
from tests.models import matrix
from tests.models.matrix import BROKEN, DOCS, QUICK, REFUSED, Cell
from tests.models.matrix_docs import page
from tests.support.cases import every

ROOT = Path(__file__).parents[2]
JUDGES = (
    "support/harness.py",
    "models/matrix.py",
    "models/matrix_modes.py",
    "models/matrix_reference.py",
    "support/tiny_configs.py",
    "support/tiny_models.py",
    "support/tiny_overrides.py",
    "support/tiny_sizes.py",
)


def in_shard(cell: Cell) -> bool:
    index, count = map(int, os.environ.get("SHARD", "1/1").split("/"))
    return zlib.crc32(cell.id.encode()) % count == index - 1


SLOW = [c for c in matrix.cells() if c not in QUICK]


@functools.cache
def digest() -> str:
    """Of everything that decides whether a cell passes."""
    sources = [p for folder in ("sparsify", "passes", "backends") for p in sorted((ROOT / folder).rglob("*.py"))]
    hasher = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for path in [*sources, *(ROOT / "tests" / name for name in JUDGES)]:
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


@pytest.fixture
def journal(request):
    """A file of passed cells, one JSON line each, which several processes may append to."""
    folder = request.config.rootpath / ".pytest_cache"
    folder.mkdir(exist_ok=True)
    return folder / "sparsify-matrix.jsonl"


def passed_before(journal: Path, cell: Cell) -> bool:
    if not journal.exists():
        return False
    entries = (json.loads(line) for line in journal.read_text().splitlines())
    return any(e["id"] == cell.id and e["sources"] == digest() for e in entries)


@pytest.mark.parametrize("cell", every(5, sorted(QUICK, key=lambda c: c.id)), ids=lambda cell: cell.id)
@pytest.mark.samples(2)
def test_each_family(cell):
    matrix.check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [pytest.param(c, id=c.id) for c in SLOW if in_shard(c)])
def test_every_cell(cell, journal):
    if passed_before(journal, cell):
        pytest.skip("passed before with these sources")
    matrix.check(cell)
    with journal.open("a") as file:
        file.write(json.dumps({"id": cell.id, "sources": digest()}) + "\n")


def test_the_documentation_says_what_the_cells_check():
    assert DOCS.read_text() == page(), "run python -m tests.models.matrix --write-docs"


def test_no_entry_of_the_tables_is_idle():
    every = list(matrix.cells())
    assert len({c.id for c in every}) == len(every)
    for entry in (*REFUSED, *BROKEN):
        assert any(entry.is_about(c) for c in every), entry


def test_shards_share_the_cells_out(monkeypatch):
    shares = []
    for i in (1, 2, 3):
        monkeypatch.setenv("SHARD", f"{i}/3")
        shares.append({c for c in SLOW if in_shard(c)})
    assert sum(map(len, shares)) == len(SLOW) == len(set().union(*shares))
    assert min(map(len, shares)) > len(SLOW) // 5


@pytest.mark.slow
def test_a_cell_that_is_listed_wrongly_fails(monkeypatch):
    """The tables are checked both ways: a site that is rewritten though listed, and one that is refused though not."""
    cell = Cell("llama", "sdpa", "prefill", "keep_all")
    wrong = matrix.Refused("llama", ".*", ".*", "the mask could not be read", "")
    monkeypatch.setattr(matrix, "REFUSED", (wrong,))
    with pytest.raises(AssertionError, match="rewritten now"):
        matrix.check(cell)
    monkeypatch.setattr(matrix, "REFUSED", ())
    monkeypatch.setattr(observed_masks, "find", lambda gm, attention, inputs: (None, attention))  # then masks that arrive are refused
    with pytest.raises(AssertionError, match="refused"):
        matrix.check(Cell("llama", "eager", "generate_static", "keep_all"))
    monkeypatch.setattr(matrix, "BROKEN", (matrix.Broken("llama", ".*", ".*", "anything", "it fails"),))
    with pytest.raises(AssertionError, match="works now"):
        matrix.check(cell)
