"""What Inductor needs for its first graph is prepared beside other work."""

from __future__ import annotations

import threading

import pytest

from sparsify.graph import compat

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def once():
    compat.prepare_inductor.cache_clear()
    yield
    compat.prepare_inductor.cache_clear()


def test_processes_and_keys_are_prepared_once(monkeypatch):
    from torch._inductor import codecache
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_compat

    started = []
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: started.append("pool"))
    monkeypatch.setattr(codecache, "torch_key", lambda: started.append("torch"))
    monkeypatch.setattr(triton_compat, "triton_key", lambda: started.append("triton"))
    for _ in range(2):
        compat.prepare_inductor()
    for thread in threading.enumerate():
        if thread.name == "sparsify cache keys":
            thread.join()
    assert sorted(started) == ["pool", "torch", "triton"]


def test_nothing_depends_on_it(monkeypatch):
    from torch._inductor.async_compile import AsyncCompile

    def fail():
        raise RuntimeError("no processes here")

    monkeypatch.setattr(AsyncCompile, "use_process_pool", fail)
    compat.prepare_inductor()
