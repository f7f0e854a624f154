"""Which releases of torch, triton and transformers are promised. Imports none of them, so that it can speak before an import fails."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
import sys

from sparsify.errors import UnsupportedError

DISTRIBUTION = "sparsify-compiler"  # our name on PyPI, where another project is called sparsify

log = logging.getLogger(__name__)

# the oldest release that is promised, and the newest that the tests have passed with
TESTED = {"torch": ("2.11", "2.14.1"), "triton": ("3.6", "3.8"), "transformers": ("5.17", "5.24")}


def installed(name: str) -> str | None:
    """The version of an installed package, of the imported one where it is imported already."""
    loaded = getattr(sys.modules.get(name), "__version__", None)
    try:
        return loaded or importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle(name: str) -> str:
    """Why a package is too old, in one clause; empty where it is not, or is not installed."""
    version, oldest = installed(name), TESTED[name][0]
    old = version is not None and _release(version) < _release(oldest)
    return f"{name} {version} is older than {oldest}, the oldest that sparsify works with" if old else ""


def newer(name: str) -> str:
    """That a package is newer than what was tested, in one clause; empty where it is not, or is not installed."""
    version, newest = installed(name), TESTED[name][1]
    return f"{name} {version} is newer than {newest}" if version is not None and _release(version) > _release(newest) else ""


def require(*names: str) -> None:
    """Raises UnsupportedError where one of these packages is too old, with what is needed."""
    for name in names:
        if why := obstacle(name):
            raise UnsupportedError(why, hint=f'pip install "{name}>={TESTED[name][0]}"')


@functools.cache
def check() -> None:
    """Once a process: one warning that names every package outside of what was tested.

    Raises:
        UnsupportedError: torch is too old. Old optional packages are only named here; what needs them raises.
    """
    require("torch")
    ahead = [why for name in TESTED if (why := newer(name))]
    told = [why for name in TESTED if (why := obstacle(name))]
    if ahead:
        told.append(f"{' and '.join(ahead)}, the newest that sparsify was tested with: what it does not recognise there stays as it was")
    if told:
        log.warning("; ".join(told))


@functools.cache
def triton_release() -> tuple[int, int]:
    """Major and minor number of the installed Triton, whose compiler and Gluon differ between them; (0, 0) without one."""
    try:
        import triton
    except ImportError:
        return (0, 0)
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number, which the first two of a version are even where it goes on as `2.15.0a0+git1234`."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
