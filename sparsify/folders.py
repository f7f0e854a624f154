"""Folders that files are written to: the cache, which only its user can write, and those that the user names. No file is written through a
link."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Generator
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


@contextlib.contextmanager
def open_folder(folder: Path) -> Generator[int]:
    """A descriptor of a folder that the user named, made when missing, for `create`.

    Raises:
        CacheFolderError: it is a link that another user made. OSError: it cannot be made, or is no folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = folder.lstat()
    link = stat.S_ISLNK(found.st_mode)
    if link and found.st_uid not in (os.geteuid(), 0):
        raise CacheFolderError("the folder is a link that belongs to another user", where=str(folder), hint="name its target")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if link else os.O_NOFOLLOW))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def create(descriptor: int, name: str, text: str) -> None:
    """Writes a new file in a folder that is open. Raises FileExistsError where anything has that name, a link to nowhere too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(name, flags, 0o666, dir_fd=descriptor), "w", encoding="utf-8") as file:
        file.write(text)


def write(text: str, path: Path) -> None:
    """Writes atomically: a racing process sees the old file or the new one, and an error leaves nothing behind."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A file beside `path`, readable by its user alone, that takes its place at the end, or vanishes with an error."""
    handle, name = tempfile.mkstemp(prefix=path.stem + ".", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
