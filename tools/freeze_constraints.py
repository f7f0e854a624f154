"""Writes the versions of this environment, whose tests have passed, as a constraints file.

Local parts of versions (`2.13.0+cpu`) are left out, so that the constraint fits every build of a release, and so are torch's CUDA packages,
which torch itself pins.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

TARGET = Path(__file__).parent / "constraints" / "tested.txt"
HEADER = "# The versions that last passed `make test`. To renew: make constraints\n"
_OURS = {"sparsify-compiler", "pip"}
_OF_TORCH = re.compile(r"(nvidia|cuda)-")


def pins() -> list[str]:
    """`name==version` of every installed distribution, sorted."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in _OURS and not _OF_TORCH.match(name):
            found[name] = distribution.version.split("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    TARGET.write_text(HEADER + "\n".join(pins()) + "\n")
    print(f"wrote {TARGET}")
