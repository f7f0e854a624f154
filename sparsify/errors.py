"""One class per kind of failure. Each says what failed, where, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsifyError(Exception):
    """Base of every error that sparsify raises on purpose.

    Args:
        what: the failure in one clause.
        where: layer path, file or key that it concerns.
        hint: what the user can do.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = ""):
        self.what, self.where, self.hint = what, where, hint
        super().__init__((f"{where}: " if where else "") + what + (f" ({hint})" if hint else ""))


class ConfigError(SparsifyError):
    """A configuration file or option that cannot be used as given."""


class PlanError(SparsifyError):
    """A plan file that does not fit the model or cannot be read."""


class RewriteError(SparsifyError):
    """A pass could not apply its own proposal."""


class VerifyError(SparsifyError):
    """A rewritten graph failed a structural or numerical check."""


class KernelError(SparsifyError):
    """A generated kernel could not be written, loaded, compiled or launched."""


class CacheFolderError(KernelError):
    """The folder for generated code is not safe to load from, or cannot be written."""


class ProfileError(SparsifyError):
    """A device profile that cannot be read, or a calibration that cannot be done here."""


class CacheError(SparsifyError):
    """A SparseCache was used in a way that it cannot follow exactly: another model or batch, a crop past what is kept."""


class DistributedError(SparsifyError):
    """Processes that run one model differ in what they do, or one of them is gone."""


class UnsupportedError(SparsifyError):
    """A device, dtype or shape that an operator does not serve, or a release of a package that sparsify does not."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the one that was probably meant, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known) if known else ""
