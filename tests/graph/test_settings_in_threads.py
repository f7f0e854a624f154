"""What torch holds in its settings during a call is not there afterwards, where calls overlap in threads too."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.fx.experimental._config as shapes
from torch._dynamo import config as dynamo

from sparsify.graph import compat


def settings() -> dict[str, object]:
    return {
        "assume_static_by_default": dynamo.assume_static_by_default,
        "automatic_dynamic_shapes": dynamo.automatic_dynamic_shapes,
        "specialize_float": dynamo.specialize_float,
        "use_duck_shape": shapes.use_duck_shape,
    }


class Overlap:
    """Two threads: the second enters while the first is inside, and leaves after it."""

    def __init__(self) -> None:
        self.second_is_in, self.first_is_out = threading.Event(), threading.Event()
        self.failed: list[BaseException] = []

    def run(self, inside) -> None:
        """inside: calls what it is given while the settings are held."""

        def second() -> None:
            try:
                inside(lambda: (self.second_is_in.set(), self.first_is_out.wait(60)))
            except BaseException as error:
                self.failed.append(error)
                self.second_is_in.set()

        ready = threading.Event()

        def entered() -> None:
            ready.set()
            self.second_is_in.wait(60)

        first = threading.Thread(target=lambda: (inside(entered), self.first_is_out.set()))
        first.start()
        assert ready.wait(60)
        other = threading.Thread(target=second)
        other.start()
        first.join(60)
        other.join(60)
        assert not self.failed and self.second_is_in.is_set() and self.first_is_out.is_set()


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_calls(dynamic):
    torch._dynamo.reset()
    before, wait, captured = settings(), threading.local(), []

    def backend(gm, inputs):
        captured.append(inputs)

        def run(*arguments):
            wait.now()
            return gm(*arguments)

        return run

    call = compat.compile_in_threads(lambda x: x + 1, dynamic=dynamic, backend=backend)

    def inside(what) -> None:
        wait.now = what
        call(torch.ones(3, 4))

    inside(lambda: None)
    Overlap().run(inside)
    assert settings() == before
    assert any(isinstance(x, torch.SymInt) for x in captured[0]) == dynamic


def test_independent_sizes():
    before = settings()

    def inside(what) -> None:
        with compat.independent_sizes():
            assert (shapes.use_duck_shape, dynamo.specialize_float) == (False, True)
            what()
            assert (shapes.use_duck_shape, dynamo.specialize_float) == (False, True)

    Overlap().run(inside)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), compat.independent_sizes():
        raise ZeroDivisionError
    assert settings() == before
