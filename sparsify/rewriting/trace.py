"""Writes every stage of a compilation as text. A failure to write never fails the compilation.

With a folder (the setting `trace` or the variable `SPARSIFY_TRACE`) each stage of each compiled graph becomes a file
`FOLDER/<graph>-<stage>.txt`. Numbers continue after the folder's files, so processes and runs may share one folder; files are created
exclusively, never overwritten or written through a link. The plan also goes to torch's structured log (`TORCH_TRACE`, read by tlparse).
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._logging._internal import trace_structured

from sparsify import folders

log = logging.getLogger(__name__)

_warned: set[str] = set()  # folders whose failure was reported in this process


class Trace:
    """Writes the stages of one compiled graph.

    Args:
        folder: created when missing; None writes no files.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.number: int | None = None  # claimed by the first stage that is written

    def stage(self, name: str, text: str | Callable[[], str], suffix: str = "txt") -> None:
        """Writes one stage.

        Args:
            name: of the stage.
            text: its text, or a callable that makes it, called only when there is a folder to write to.
            suffix: of the file's name.
        """
        if self.folder is None:
            return
        try:
            content = text() if callable(text) else text
            path = self._write(self.folder, f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.{suffix}", content.rstrip("\n") + "\n")
            log.debug("stage %s: %s", name, path)
        except Exception as error:
            self._warn(name, error)

    def plan(self, plan: Any) -> None:
        """Writes a plan as text and as JSON, and hands it to torch's structured log."""
        self.stage("plan", lambda: str(plan))
        self.stage("plan", lambda: plan.to_json(), suffix="json")
        try:
            trace_structured(
                "artifact", metadata_fn=lambda: {"name": "sparsify_plan", "encoding": "json"}, payload_fn=lambda: plan.to_json()
            )
        except Exception as error:
            self._warn("structured log", error)

    def _write(self, target: Path, name: str, content: str) -> Path:
        """Creates one file in the folder `target` and returns its path."""
        with folders.open_folder(target) as folder:
            if self.number is not None:
                folders.create(folder, f"{self.number:03d}-{name}", content)
                return target / f"{self.number:03d}-{name}"
            entries = os.listdir(folder)  # noqa: PTH208  (of the folder that is open, whatever has its name now)
            taken = [int(found[1]) for entry in entries if (found := re.match(r"(\d+)-", entry))]
            number = max(taken, default=-1) + 1
            while True:  # exclusive creation settles a race between processes: the loser takes the next number
                try:
                    folders.create(folder, f"{number:03d}-{name}", content)
                except FileExistsError:
                    number += 1
                    continue
                self.number = number
                return target / f"{number:03d}-{name}"

    def _warn(self, name: str, error: Exception) -> None:
        log.debug("stage %s could not be traced", name, exc_info=error)
        if str(self.folder) not in _warned:
            _warned.add(str(self.folder))
            warnings.warn(f"sparsify could not write its trace of {name}: {type(error).__name__}: {error}", stacklevel=3)
