"""Releases outside of what was tested: told once, in one sentence; too old is an error that says what is needed."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import types

import pytest
import torch

import sparsify
from sparsify import releases
from sparsify.backends import dispatch
from sparsify.errors import UnsupportedError

_GIVEN = {"torch": "2.13.0+cpu", "triton": "3.8.1", "transformers": "5.24.0"}


@pytest.fixture
def stack(monkeypatch):
    """Sets what seems to be installed; None takes a package away."""

    def set_versions(**versions: str | None) -> None:
        def version(name: str) -> str:
            if (found := (_GIVEN | versions)[name]) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        for name in _GIVEN:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())
        monkeypatch.setattr(importlib.metadata, "version", version)
        releases.check.cache_clear()

    yield set_versions
    releases.check.cache_clear()


def _told(caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sparsify"):
        releases.check()
        releases.check()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", releases.TESTED)
def test_the_tested_range_says_nothing(stack, caplog, name):
    for version in releases.TESTED[name]:
        stack(**{name: version})
        assert _told(caplog) == []


def test_patch_releases_and_missing_packages_say_nothing(stack, caplog):
    stack(torch="2.14.9", triton=None, transformers=None)
    assert _told(caplog) == []


def test_newer_releases_are_told_in_one_warning(stack, caplog):
    stack(torch="2.100.0a0+git12ab", transformers="6.0.dev0")
    (message,) = _told(caplog)
    assert "torch 2.100.0a0+git12ab is newer than 2.14.1 and transformers 6.0.dev0 is newer than 5.24," in message
    assert "triton" not in message


def test_an_old_torch_is_an_error_with_what_is_needed(stack):
    stack(torch="2.9.1")
    with pytest.raises(UnsupportedError, match=r'torch 2\.9\.1 is older than 2\.11, .*pip install "torch>=2\.11"'):
        releases.check()


def test_an_old_optional_package_is_told_and_raises_where_it_is_needed(stack, caplog, monkeypatch):
    stack(transformers="5.9.0", triton="3.5.1")
    (message,) = _told(caplog)
    assert "triton 3.5.1 is older than 3.6" in message and "transformers 5.9.0 is older than 5.17" in message
    with pytest.raises(UnsupportedError, match=r"transformers>=5\.17"):
        sparsify.SparseCache  # noqa: B018
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    assert dispatch._obstacle.__wrapped__("cuda", 0, "auto") == releases.obstacle("triton") != ""


def test_the_imported_package_counts(stack, monkeypatch):
    stack(torch="2.9.1")
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert releases.installed("torch") == torch.__version__


def test_what_runs_here_is_not_too_old():
    releases.require(*releases.TESTED)
