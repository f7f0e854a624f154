"""Generated kernel text against the text that was accepted before."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "goldens" / "kernels"


def check_kernel_text(name: str, text: str) -> None:
    """Compares with tests/goldens/kernels/<name>.txt. SPARSIFY_ACCEPT=1 writes the new text; the diff is then for the commit's reader."""
    golden = _FOLDER / f"{name}.txt"
    if os.environ.get("SPARSIFY_ACCEPT") == "1":
        golden.write_text(text)
    wanted = golden.read_text() if golden.exists() else ""
    assert text == wanted, "\n".join(difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "generated", lineterm=""))
