"""The calls that compute-sanitizer watches on a GPU are served by generated kernels, here in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import sys

import pytest

from sparsify.backends.codegen import source
from tests.sanitizer import run

pytestmark = pytest.mark.interpreter

QUICK = "tokens"
# Gluon's warps hand over messages, which the interpreter does not know
FAMILIES = [pytest.param(one, marks=[] if one == QUICK else [pytest.mark.slow]) for one in run.FAMILIES if one not in ("gluon", "control")]


@pytest.fixture
def loaded(monkeypatch):
    """Names of the generated modules that are loaded from now on, those of earlier tests too."""
    for name, module in sorted(sys.modules.items()):
        for value in vars(module).values() if name.startswith("sparsify.backends") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    names, load = [], source.load
    monkeypatch.setattr(source, "load", lambda text, name: names.append(name) or load(text, name))
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_load_the_modules_of_their_family(family, loaded):
    """A call that no kernel takes raises, one that another kernel takes loads another module."""
    names = []
    for name, call in run.cases(family, "cpu"):
        call()
        names.append(name)
    assert len(names) == len(set(names)) > 1
    assert {name.partition("_bf16")[0] for name in loaded} == set(run.FAMILIES[family])
