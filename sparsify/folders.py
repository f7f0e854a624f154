"""The cache folder, which only its user can write: generated code and measured device profiles live there as plain text."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from sparsify.errors import CacheFolderError

FOLDER_MODE = 0o700


def cache_folder() -> Path:
    """SPARSIFY_CACHE_DIR, else XDG_CACHE_HOME/sparsify, else ~/.cache/sparsify."""
    if named := os.environ.get("SPARSIFY_CACHE_DIR"):
        return Path(named).expanduser().absolute()
    # the XDG base directory specification says that a relative path is to be ignored
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "sparsify"


def secure(folder: Path) -> None:
    """Makes `folder` or checks that it is a real folder of this user which nobody else can write to.

    Raises:
        CacheFolderError: it is not.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=FOLDER_MODE)
    check(folder)


def check(folder: Path) -> None:
    """Raises CacheFolderError unless `folder` is a real folder of this user which nobody else can write to."""
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise CacheFolderError("the cache folder is a symbolic link", where=str(folder), hint="name its target in SPARSIFY_CACHE_DIR")
    if not stat.S_ISDIR(found.st_mode):
        raise CacheFolderError("the cache folder is not a folder", where=str(folder), hint="set SPARSIFY_CACHE_DIR to a folder")
    if found.st_uid != os.geteuid():
        raise CacheFolderError(
            "the cache folder belongs to another user", where=str(folder), hint="set SPARSIFY_CACHE_DIR to a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheFolderError("others can write to the cache folder", where=str(folder), hint=f"chmod 700 {folder}")


def write(text: str, path: Path) -> None:
    """Writes atomically: a racing process sees the old file or the new one, and an error leaves nothing behind."""
    handle, temporary = tempfile.mkstemp(prefix=path.stem + ".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
