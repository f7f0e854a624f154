"""The line on the terminal about long work."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

import sparsify
from sparsify import progress
from sparsify.progress import Line


def line(patience=0.05, terminal=True):
    return Line(Console(file=io.StringIO(), force_terminal=terminal, width=100), patience)


def until(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def drawers():
    return [thread for thread in threading.enumerate() if thread.name == "sparsify progress"]


def test_long_work_is_shown_and_then_taken_away():
    shown = line()
    task = shown.start("reading a prompt of 131072 tokens")
    until(lambda: "reading a prompt of 131072 tokens (0 s)" in shown.console.file.getvalue())
    task.done()
    until(lambda: not drawers())
    assert "\x1b[2K" in shown.console.file.getvalue().rsplit(" s)", 1)[1]  # the line is erased
    assert not shown.lines()
    task.done()
    again = shown.start("compiling a graph")  # a new thread draws it
    until(lambda: "compiling a graph" in shown.console.file.getvalue())
    again.done()
    until(lambda: not drawers())


def test_short_work_and_no_terminal_are_quiet():
    shown, deaf = line(patience=60), line(terminal=False)
    for one in (shown, deaf):
        one.start("short").done()
        assert one.console.file.getvalue() == ""
    deaf.start("never ends")
    time.sleep(0.1)
    assert deaf.console.file.getvalue() == "" and not deaf.lines()
    until(lambda: not drawers())


def test_threads_share_the_line():
    shown = line()

    def work(number):
        task = shown.start(f"task {number}")
        until(lambda: f"task {number}" in shown.console.file.getvalue())
        task.done()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not drawers())


def test_failing_work_ends_and_the_option_says_nothing(monkeypatch):
    shown = line(patience=0)
    monkeypatch.setattr(progress, "_line", shown)
    with pytest.raises(ValueError, match="no"), progress.task("fails"):
        assert shown.lines() == ["sparsify: fails (0 s)"]
        raise ValueError("no")
    assert not shown.lines()
    with progress.task("silent", shown=False):
        assert not shown.lines()
    until(lambda: not drawers())


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.samples(1)
def test_compiling_and_prompts_tell(monkeypatch, wanted):
    import torch

    from tests.support.cache_reference import text
    from tests.support.tiny_models import build

    told = []
    monkeypatch.setattr(progress, "_line", shown := line(patience=0))
    monkeypatch.setattr(shown, "start", lambda label: (told.append(label), progress.Task(None))[1])
    torch._dynamo.reset()
    model = sparsify.compile(build("llama", layers=1), lower="eager", strict=True, progress=wanted)
    model.generate(text(2, 20), max_new_tokens=3, do_sample=False)
    torch._dynamo.reset()
    assert ("reading 2 prompts of 20 tokens" in told and "compiling layers (1 alike)" in told) if wanted else not told
