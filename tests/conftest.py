"""Settings for all tests."""

import logging

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from hypothesis import HealthCheck, settings

from sparsify.backends import dispatch
from sparsify.graph import unforeseen
from tests.support.run_records import pytest_addoption, pytest_terminal_summary
from tests.support.samples import pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_terminal_summary"]

# How fast an example is drawn says more about the machine's load than about the code.
settings.register_profile("sparsify", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sparsify")


class _Deprecations(logging.Handler):
    """transformers only logs some deprecations, once a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(LOGGED_BY_ITSELF):
            self.found.append(message)


# what transformers does by itself: assisted decoding calls `generate` of the assistant so
LOGGED_BY_ITSELF = ("Passing `generation_config` together with generation-related arguments",)


@pytest.fixture(autouse=True)
def no_logged_deprecation():
    """As pyproject's filterwarnings, for deprecations that are logged."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.found


@pytest.fixture
def fresh_dynamo():
    """Nothing is compiled before a test, and nothing of it is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def nothing_unforeseen(request):
    """An exception that costs a user one site is a failure here, except in tests that ask for it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = records.append
    level = unforeseen.log.level
    unforeseen.log.addHandler(handler)
    unforeseen.log.setLevel(logging.INFO)
    yield records
    unforeseen.log.removeHandler(handler)
    unforeseen.log.setLevel(level)
    if records and not request.node.get_closest_marker("unforeseen"):
        raise records[0].exc_info[1]


@pytest.fixture(autouse=True)
def torch_settings_stay(request):
    """What torch holds in settings during a call is not there afterwards: torch before 2.13 shares them among threads."""
    held = [(torch._dynamo.config, name) for name in ("assume_static_by_default", "automatic_dynamic_shapes", "specialize_float")]
    held.append((torch.fx.experimental._config, "use_duck_shape"))
    before = [getattr(module, name) for module, name in held]
    yield
    after = [getattr(module, name) for module, name in held]
    for (module, name), value in zip(held, before, strict=True):
        setattr(module, name, value)
    assert after == before or request.node.get_closest_marker("torch_in_threads")


@pytest.fixture(autouse=True)
def choice_of_kernels_stays():
    """What one test asks to be served by serves no later one."""
    yield
    left = (dispatch._kernels, dispatch._kernels_here.get(), dispatch._strict.get())
    dispatch._kernels = "auto"
    dispatch._kernels_here.set(None)
    dispatch._strict.set(False)
    assert left == ("auto", None, False)
