"""The clock times what it is given: how often it calls, what it returns, and that a graph holds no host time."""

from __future__ import annotations

import time

import pytest
import torch

from sparsify.commands.bench.clock import Clock, reason

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


class Counted:
    """A call that takes some milliseconds of the host."""

    def __init__(self, milliseconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, milliseconds / 1e3

    def __call__(self) -> int:
        time.sleep(self.seconds)
        self.calls += 1
        return self.calls


def test_one_call_and_a_loop() -> None:
    clock, run = Clock("cpu"), Counted(5)
    milliseconds, result = clock.once(run)
    assert result == 1 and 5 <= milliseconds < 50
    assert 5 <= clock.loop(run, 3) < 50 and run.calls == 4
    assert len(clock.samples(run, 2)) == 2 and run.calls == 6


def test_contestants_take_turns_and_absent_ones_say_why() -> None:
    def broken() -> None:
        raise ModuleNotFoundError("no flash_attn")

    slow, quick = Counted(5), Counted(1)
    times, absent = Clock("cpu").turns({"slow": slow, "broken": broken, "quick": quick}, rounds=3, sample_ms=60, most=8)
    assert absent == {"broken": "ModuleNotFoundError: no flash_attn"}
    assert times.keys() == {"slow", "quick"} and min(times["slow"]) > max(times["quick"]) >= 1
    assert slow.calls == 3, "two to look, and on a CPU one to count"


def test_what_is_no_number_has_a_reason() -> None:
    assert reason(ValueError("x" * 1000)) == "ValueError: " + "x" * 300


def test_on_a_cpu_a_graph_is_its_calls() -> None:
    run = Counted()
    replay = Clock("cpu").graph(run, calls=3)
    assert run.calls == 1 and replay() == 4


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_under_load(device: str) -> None:
    a = torch.ones(64, 64, device=device)
    found = Clock(device).under_load(lambda: a @ a)
    assert 0 < found["ms"] < 10 and found.keys() == {"ms", "mhz", "watts"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_holds_no_host_time() -> None:
    clock, total = Clock("cuda"), torch.zeros(1, device="cuda")

    def slow_host() -> torch.Tensor:
        time.sleep(2e-3)
        return total.add_(1)

    replay = clock.graph(slow_host, calls=4)
    before = float(total)
    assert replay() is total and float(total) == before + 4
    assert clock.replays(slow_host, 5) < 0.5  # ms
    assert all(sample < 0.5 for sample in clock.samples(replay, 10, flush=True))
