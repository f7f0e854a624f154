"""Tests of many slow cases: some of the cases are quick."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with `samples(n)`, n of the cases that were collected, evenly spaced, are quick; the others are marked slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("samples"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for found in cases.values():
        count = found[0].get_closest_marker("samples").args[0]
        quick = [item for item in found if not item.get_closest_marker("slow")]
        kept = {id(quick[len(quick) * i // count]) for i in range(count)} if len(quick) > count else {id(item) for item in quick}
        for item in quick:
            if id(item) not in kept:
                item.add_marker(pytest.mark.slow)
