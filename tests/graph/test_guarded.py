"""Compiled code that is called by its guards alone: as Dynamo would call it, and through Dynamo wherever that would do anything else."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch

from sparsify.graph import compat, isolated
from sparsify.graph.guarded import Guarded

X = torch.arange(6.0).view(2, 3).clone()  # no view: Dynamo guards on what a view is of


def adjusted(x):
    return x * 2


class Counted:
    """A guarded function, how many graphs were compiled of it and how many of its calls went through Dynamo."""

    def __init__(self, function, **how):
        self.graphs = self.slow = 0
        self.function: types.FunctionType = isolated.copy_of(function)
        self.run = Guarded(self.function, self._backend, dynamic=True, **how)
        through = self.run._through_dynamo

        def counted(*args):
            self.slow += 1
            return through(*args)

        self.run._through_dynamo = counted

    def _backend(self, gm, inputs):
        self.graphs += 1
        assert not compat.dynamo_is_idle()
        return gm.forward

    def __call__(self, *args, slow: bool):
        """The result of a call that goes through Dynamo, or does not."""
        before = self.slow
        result = self.run(*args)
        assert self.slow - before == slow
        return result


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def scaled(x, options):
    return adjusted(x) * options["factor"] * (-1 if options["name"] == "turned" else 1), options["name"]


def test_calls_whose_guards_hold_go_past_dynamo():
    run = Counted(scaled, fullgraph=True)
    for slow in (True, False, False):
        result, name = run(X, {"factor": 3, "name": "a"}, slow=slow)
        assert torch.equal(result, X * 6) and name == "a"
    assert torch.equal(run(X[:1], {"factor": 3, "name": "a"}, slow=True)[0], X[:1] * 6)  # a size of one is another graph
    for rows in (2, 5, 9):
        assert torch.equal(run(torch.ones(rows, 3), {"factor": 3, "name": "a"}, slow=False)[0], torch.full((rows, 3), 6.0))
    assert run.graphs == 2


def test_every_guard_is_evaluated_at_every_call(monkeypatch):
    run = Counted(scaled, fullgraph=True)
    run(X, {"factor": 3, "name": "a"}, slow=True)
    for slow in (True, False):
        assert torch.equal(run(X, {"factor": 3, "name": "turned"}, slow=slow)[0], X * -6)
        assert torch.equal(run(X, {"factor": 3, "name": "a"}, slow=False)[0], X * 6)
    assert run(X.double(), {"factor": 3, "name": "a"}, slow=True)[0].dtype == torch.float64
    monkeypatch.setitem(globals(), "adjusted", lambda x: x * 5)
    assert torch.equal(run(X, {"factor": 3, "name": "a"}, slow=True)[0], X * 15)
    with torch.autocast("cpu"):
        run(X, {"factor": 3, "name": "a"}, slow=True)
    monkeypatch.undo()
    assert torch.equal(run(X, {"factor": 3, "name": "a"}, slow=False)[0], X * 6)


@pytest.mark.parametrize("throw_away", ["reset", "forget"])
def test_what_dynamo_throws_away_is_not_called(throw_away):
    run = Counted(scaled, fullgraph=True)
    run(X, {"factor": 3, "name": "a"}, slow=True)
    run(X, {"factor": 3, "name": "a"}, slow=False)
    if throw_away == "reset":
        torch._dynamo.reset()
    else:
        compat.forget(run.function.__code__, run.run.backend)
    run(X, {"factor": 3, "name": "a"}, slow=True)
    assert run.graphs == 2
    run(X, {"factor": 3, "name": "a"}, slow=False)


def test_a_module_that_is_gone_is_not_taken_for_another():
    run = Counted(lambda x, module: module(x), fullgraph=True)
    for width in (2, 4, 5):
        module = torch.nn.Linear(3, width)
        for _ in range(2):
            torch.testing.assert_close(run.run(X, module), module(X))
        del module
        gc.collect()


def test_side_effects_are_those_of_the_call():
    def store(x, held):
        held["kept"] = x + 1
        held.pop("old", None)
        return held["kept"] * 2

    run = Counted(store, fullgraph=True)
    for number, slow in ((1.0, True), (2.0, False), (3.0, False)):
        held = {"old": 1}
        result = run(X + number, held, slow=slow)
        assert [*held] == ["kept"] and torch.equal(held["kept"], X + number + 1) and torch.equal(result, (X + number + 1) * 2)


def test_frames_that_break_go_through_dynamo():
    """What comes behind a break is compiled while Dynamo evaluates frames."""

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    def at_the_end(x):
        return inner(x + 1)

    def inner(x):
        torch._dynamo.graph_break()
        return x * 2

    for function in (broken, at_the_end):
        run = Counted(function, fullgraph=False)
        for _ in range(3):
            assert torch.equal(run(X, slow=True), (X + 1) * 2)


def test_what_is_asked_of_dynamo_is_asked():
    run = Counted(scaled, fullgraph=True)
    given = (X, {"factor": 3, "name": "a"})
    run(*given, slow=True)
    for stance in ("force_eager", "eager_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            run(*given, slow=True)
    with torch.compiler.set_stance("default", force_backend="eager"):
        run(*given, slow=True)
    run(*given, slow=False)


def test_what_a_stance_had_another_backend_compile_is_not_called():
    run = Counted(scaled, fullgraph=True)
    given = (X, {"factor": 3, "name": "a"})

    def negating(gm, inputs):
        return lambda *values: tuple(-value for value in gm.forward(*values))

    for slow in (True, False):
        with torch.compiler.set_stance("default", force_backend=negating):
            assert torch.equal(run(*given, slow=True)[0], X * -6)
        assert torch.equal(run(*given, slow=slow)[0], X * 6)
    assert run.graphs == 1


def test_what_was_compiled_goes_with_its_function():
    """Dynamo keeps every backend until it is reset."""
    gone = []

    def noting(gm, inputs):
        gone.append(weakref.ref(gm))
        return lambda *values: gm.forward(*values)

    run = Guarded(isolated.copy_of(scaled), noting, dynamic=True, fullgraph=True)
    for _ in range(3):
        run(X, {"factor": 3, "name": "a"})
    assert [held() is None for held in gone] == [False]
    del run
    gc.collect()
    assert gone[0]() is None
