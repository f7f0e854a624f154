"""Needles in a haystack, as `sparsify eval` has them, and a text to hide them in that every machine has."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

from sparsify.commands.eval.intervals import wilson
from sparsify.commands.eval.needles import FIRST_SEED, FORMS, Prompt, Score, prompt, right_answers, score, text_nll

__all__ = ["FIRST_SEED", "FORMS", "Prompt", "Score", "prompt", "right_answers", "score", "stdlib_text", "text_nll", "wilson"]


def stdlib_text(limit: int | None = None) -> bytes:
    """The source text of this Python's standard library (PSF licence), files in a fixed order, without its tests; at most `limit` bytes."""
    text = bytearray()
    for path in _stdlib_files():
        text += path.read_bytes()
        if limit is not None and len(text) >= limit:
            return bytes(text[:limit])
    return bytes(text)


@functools.cache
def _stdlib_files() -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    # a digest of the name mixes packages, so that any stretch of the text is as varied as the whole
    return tuple(sorted(files, key=lambda path: (_mix(path.relative_to(root).as_posix()), path)))


def _mix(name: str) -> int:
    mixed = 2166136261  # FNV-1a, 32 bits
    for byte in name.encode():
        mixed = ((mixed ^ byte) * 16777619) & 0xFFFFFFFF
    return mixed
