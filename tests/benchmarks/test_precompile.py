"""Jobs that compile side by side: what fails or takes too long is told, and the others go on."""

from __future__ import annotations

import sys

from benchmarks.lib.precompile import compile_side_by_side


def test_what_fails_or_takes_too_long_is_told(capsys):
    run = lambda code: [sys.executable, "-c", code]
    compile_side_by_side({"good": run("pass"), "bad": run("raise ValueError('no')"), "slow": run("import time; time.sleep(60)")}, 2)
    assert capsys.readouterr().out.splitlines() == ["compiling bad: ['ValueError: no']", "compiling slow: took too long"]
