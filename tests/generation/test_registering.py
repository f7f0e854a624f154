"""When transformers learns the names of sparsify's attention functions: as soon as its registry has been imported, whoever looked."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from sparsify.generation import registering


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A module in the registry's place, and the list that gets an entry for each registration."""
    done: list[bool] = []
    (tmp_path / "stand_in_registry.py").write_text("ALL_ATTENTION_FUNCTIONS = {}\n")
    (tmp_path / "broken_registry.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if not isinstance(one, registering._WhenImported)])
    monkeypatch.setattr(registering, "_HOME", "stand_in_registry")
    monkeypatch.setattr(registering, "_register", lambda: done.append("stand_in_registry" in sys.modules))
    yield done
    sys.modules.pop("stand_in_registry", None)


def hooks():
    return [one for one in sys.meta_path if isinstance(one, registering._WhenImported)]


def test_it_registers_once_the_registry_is_there(registry):
    registering.register()
    registering.register()
    assert len(hooks()) == 1 and registry == []
    module = importlib.import_module("stand_in_registry")
    assert registry == [True] and not hooks()
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    importlib.reload(module)
    registering.register()
    assert registry == [True, True]  # the second because it is there


def test_a_search_loses_nothing(registry):
    registering.register()
    for _ in range(2):
        assert importlib.util.find_spec("stand_in_registry").origin.endswith("stand_in_registry.py")
    assert registry == []
    importlib.import_module("stand_in_registry")
    assert registry == [True]


def test_others_are_found_as_before(registry):
    registering.register()
    assert importlib.util.find_spec("json").loader is not None and importlib.util.find_spec("no_such_module_anywhere") is None


def test_a_registry_that_fails_says_so_itself(registry, monkeypatch):
    monkeypatch.setattr(registering, "_HOME", "broken_registry")
    registering.register()
    with pytest.raises(ImportError, match="half installed"):
        importlib.import_module("broken_registry")
    assert registry == []


def test_while_the_registry_is_being_imported_nothing_can_be_added(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "stand_in_registry", type(sys)("stand_in_registry"))
    registering.register()
    assert registry == [] and not hooks()
