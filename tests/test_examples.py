"""The examples do what they say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsify import testing

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()  # a program of its own

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_a_long_document(load, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("long_document")
    with testing.record_blocks() as selections:
        assert module.main([]) == {"dense": module.ASKED, "sparse": module.ASKED}
    assert len(selections) == 4 * (1 + module.ASKED), "each of 4 layers, when it is explained and for each prompt"
    assert sum(one.density for one in selections) / len(selections) < 0.6
    assert "4 of 4 attention sites rewritten" in capsys.readouterr().out


@pytest.mark.slow
def test_a_padded_batch(load) -> None:
    module = load("padded_batch")
    with testing.record_blocks() as selections:
        together, alone = module.main()
    assert together == alone and all(answer.isdigit() for answer in alone)
    assert len(selections) == 4


def test_a_chat_over_a_cache_that_evicts(load, capsys: pytest.CaptureFixture[str]) -> None:
    right, share = load("sparse_cache_chat").main()
    assert right == [True] * 3
    assert 0.24 < share < 0.27
    assert "3053 tokens seen" in capsys.readouterr().out


def test_the_readme_names_every_example() -> None:
    page = (EXAMPLES.parent / "README.md").read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f"examples/{path.name}" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tp", "cp"])
def test_several_gpus(way: str) -> None:
    """As its first line says, without GPUs."""
    if way == "tp":
        pytest.importorskip("accelerate", reason="from_pretrained divides a model with accelerate alone")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "examples/several_gpus.py",
        "--way",
        way,
    ]
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, env=settings, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(re.findall(r"process (\d) of 2: 271828", done.stdout)) == ["0", "1"]  # lines of two processes may run into each other
