"""Interpreter tests need TRITON_INTERPRET=1 before Triton is first imported: a process of their own.

TRITON_INTERPRET=1 pytest tests -m interpreter
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRET:
    from tests.support import interpreter_shim

    interpreter_shim.install()


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        needs_interpreter = item.get_closest_marker("interpreter") is not None
        if needs_interpreter and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs a process of its own with TRITON_INTERPRET=1"))
        if not needs_interpreter and INTERPRET:
            item.add_marker(pytest.mark.skip(reason="compiles kernels, which TRITON_INTERPRET=1 prevents"))
