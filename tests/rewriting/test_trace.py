import os
import subprocess
import sys
import warnings

import pytest

from sparsify.rewriting import trace
from sparsify.rewriting.trace import Trace


class FakePlan:
    def __str__(self):
        return "a table"

    def to_json(self):
        return '{"decisions": []}'


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(trace, "_warned", set())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_stages_of_one_graph_share_a_number_and_graphs_do_not(tmp_path):
    first, second = Trace(tmp_path / "new" / "folder"), Trace(tmp_path / "new" / "folder")
    first.stage("captured", "one")
    second.stage("captured", lambda: "two")
    first.stage("rewritten", "three")
    first.plan(FakePlan())
    folder = tmp_path / "new" / "folder"
    assert names(folder) == ["000-captured.txt", "000-plan.json", "000-plan.txt", "000-rewritten.txt", "001-captured.txt"]
    assert (folder / "001-captured.txt").read_text() == "two\n"
    assert (folder / "000-plan.txt").read_text() == "a table\n"


def test_a_later_run_overwrites_nothing(tmp_path):
    (tmp_path / "007-captured.txt").write_text("old")
    Trace(tmp_path).stage("captured", "new")
    assert (tmp_path / "007-captured.txt").read_text() == "old"
    assert (tmp_path / "008-captured.txt").read_text() == "new\n"


def test_a_race_is_settled_by_exclusive_creation(tmp_path, monkeypatch):
    first = Trace(tmp_path)
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # both processes saw an empty folder
    first.stage("captured", "first")
    Trace(tmp_path).stage("captured", "second")
    assert (tmp_path / "000-captured.txt").read_text() == "first\n"
    assert (tmp_path / "001-captured.txt").read_text() == "second\n"


def test_without_a_folder_nothing_is_computed():
    Trace(None).stage("captured", lambda: pytest.fail("asked for a text that nobody reads"))


def test_failures_warn_once_and_never_raise(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trace(blocked).stage("captured", "text")
        Trace(blocked).stage("captured", "text")
        Trace(blocked).plan(FakePlan())
    assert len(caught) == 1
    assert "could not write its trace of captured" in str(caught[0].message)


def test_a_text_that_cannot_be_made_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        Trace(tmp_path).stage("captured", lambda: str(1 / 0))
    assert names(tmp_path) == []


def test_stage_names_cannot_leave_the_folder(tmp_path):
    Trace(tmp_path / "in").stage("../../escape", "text")
    assert names(tmp_path) == ["in"]
    assert len(names(tmp_path / "in")) == 1


def run_python(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(("level", "seen"), [("+sparsify", True), ("sparsify", False)])
@pytest.mark.samples(1)
def test_torch_logs_names_our_loggers(level, seen):
    code = (
        "import torch, sparsify, logging; log = logging.getLogger('sparsify.pipeline'); log.debug('fine grain'); log.info('coarse grain')"
    )
    output = run_python(code, TORCH_LOGS=level)
    assert "coarse grain" in output
    assert ("fine grain" in output) is seen


@pytest.mark.slow
def test_torch_trace_gets_the_plan(tmp_path):
    plan = "class P:\n    def to_json(self): return '{\"marker\": 1}'\n"
    code = f"import torch\nfrom sparsify.rewriting.trace import Trace\n{plan}Trace(None).plan(P())\n"
    run_python(code, TORCH_TRACE=str(tmp_path))
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "sparsify_plan" in text and '"marker": 1' in text
