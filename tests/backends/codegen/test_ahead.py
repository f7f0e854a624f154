"""Kernels that a process compiles ahead are those that launches run, and launches wait for nothing that does not come."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from sparsify.backends.codegen import ahead, launch, source
from sparsify.backends.codegen.ahead_worker import Driver
from sparsify.backends.codegen.arguments import Argument, constexprs, floats, integers, parameters, pointers, unspecialised

ARGUMENTS = [
    *pointers("bf16", "data"),
    *pointers("i32", "numbers"),
    *integers("length", specialised=False),
    *integers("stride", "count", "single"),
    *floats("scale"),
    *constexprs("BLOCK"),
]
TEXT = f"""
import triton
import triton.language as tl

@triton.jit(do_not_specialize=[{unspecialised(ARGUMENTS)}])
def scaled({parameters(ARGUMENTS)}):
    at = tl.arange(0, BLOCK)
    number = tl.load(numbers + single)
    tl.store(data + at * stride, (tl.load(data + at * count, mask=at < length) * scale).to(tl.bfloat16) + number)
"""
# at an address that is no multiple of 16 bytes: another binary
TENSORS = {"data": torch.zeros(64, dtype=torch.bfloat16), "numbers": torch.zeros(9, dtype=torch.int32)[1:]}
VALUES = {**TENSORS, "length": 48, "stride": 32, "count": 5, "single": 1, "scale": 0.5, "BLOCK": 16}
TARGET = ("cuda", 90, 32)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "generated"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ahead, "_compiler", None)
    yield source.load(TEXT, "scaled").scaled
    ahead.close()


def record(kernel, **changed):
    with ahead.recording() as found:
        launch.launch(kernel, (1,), ARGUMENTS, VALUES | changed, num_warps=2)
    return found


def test_lengths_that_change_are_one_launch(kernel):
    one, same = record(kernel), record(kernel, length=33, count=7, stride=48, scale=2.0)
    assert one == same and len(one) == 1
    others = [record(kernel, stride=33), record(kernel, count=16), record(kernel, single=2), record(kernel, BLOCK=32)]
    others += [record(kernel, numbers=torch.zeros(8, dtype=torch.int32)), record(kernel, count=1 << 40)]
    assert all(other != one for other in others)
    assert len({other[0] for other in others}) == len(others)


def _wait(compiler, until):
    deadline = time.monotonic() + 120
    while not until() and time.monotonic() < deadline:
        with compiler._lock:
            compiler._hear(1)
    assert until()


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(kernel, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    compiler = ahead.compiler(TARGET)
    (planned,) = record(kernel)
    compiler.submit([planned, planned])
    assert len(compiler.pending) == 1
    _wait(compiler, lambda: not compiler.pending)
    binaries = sorted((tmp_path / "triton").rglob("*.cubin"))
    assert len(binaries) == 1, "the other process compiled nothing"
    # the launch itself, but for running it
    monkeypatch.setattr(driver, "_active", Driver(GPUTarget(*TARGET)))
    kernel.warmup(*[VALUES[argument.name] for argument in ARGUMENTS], grid=(1,), num_warps=2)
    assert sorted((tmp_path / "triton").rglob("*.cubin")) == binaries
    kernel.warmup(*[(VALUES | {"stride": 33})[argument.name] for argument in ARGUMENTS], grid=(1,), num_warps=2)
    assert len([*(tmp_path / "triton").rglob("*.cubin")]) == 2, "this would not show another binary"


@pytest.mark.slow
def test_the_process_ends_with_this_one(kernel):
    program = (
        "import time; from sparsify.backends.codegen import ahead\n"
        "compiler = ahead.compiler(('cuda', 90, 32)); compiler.start(); print(compiler._process.pid)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert not done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


class Silent(ahead.Compiler):
    """A process that says what the test says."""

    def __init__(self, *answers):
        super().__init__(TARGET)
        self.sent, self.answers = [], [answer.encode() for answer in answers]

    def _send(self, message):
        self.sent.append(message)
        return True

    def _hear(self, seconds):
        if not self.answers or (seconds == 0 and self.answers[0].startswith(b"later ")):
            return False
        read, write = os.pipe()
        os.write(write, self.answers.pop(0).removeprefix(b"later "))
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            self._process = SimpleNamespace(stdout=pipe, kill=int, communicate=int)
            found = super()._hear(1)
            self._process = None
        return found


def test_a_launch_withdraws_what_has_not_begun(kernel):
    (planned,) = record(kernel)
    compiler = Silent()
    compiler.submit([planned])
    compiler.wait(planned)
    assert compiler.sent[-1] == (1,) and not compiler.pending


@pytest.mark.parametrize("end", ["later done 1", "later failed 1 ValueError something", "later "], ids=["done", "failed", "gone"])
def test_a_launch_waits_for_what_has_begun(kernel, end):
    (planned,) = record(kernel)
    compiler = Silent("started 1\n", f"{end}\n" if end != "later " else end)
    compiler.submit([planned])
    compiler.wait(planned)
    assert len(compiler.sent) == 1 and not compiler.pending and not compiler.answers


def test_launches_ask_only_while_something_is_pending(kernel, monkeypatch):
    compiler = Silent()
    monkeypatch.setattr(ahead, "_compiler", compiler)
    monkeypatch.setattr(ahead, "planned", lambda *args: pytest.fail("the steady state describes a launch"))
    assert not ahead.meet(kernel, ARGUMENTS, [], {})


def test_a_dead_process_is_started_again(kernel):
    compiler = ahead.compiler(TARGET)
    compiler.start()
    compiler._process.kill()
    compiler._process.wait()
    (planned,) = record(kernel)
    compiler.submit([planned])
    assert compiler.pending
    compiler.wait(planned)
    assert not compiler.pending


def test_arguments_without_a_value_and_flags():
    assert ahead.described(Argument("flag", "i32"), True) == ("integer", 1)
    assert ahead.described(Argument("none", "*u8"), None) == ("none",)
