"""Kernels compiled side by side before anything is timed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence


def compile_side_by_side(commands: Mapping[str, Sequence[str]], seconds: float) -> None:
    """Runs each job's command in a process of its own; one that fails, or is not done after so many seconds in all, is told and left."""
    started = {
        job: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for job, command in commands.items()
    }
    end = time.monotonic() + seconds
    for job, process in started.items():
        try:
            _, complaints = process.communicate(timeout=max(1, end - time.monotonic()))
            if process.returncode:
                print(f"compiling {job}: {complaints.strip().splitlines()[-1:]}", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"compiling {job}: took too long", flush=True)
