"""Generated source text becomes an importable module, through a cache folder that only its user can write.

The file's name carries the text's SHA-256, so a text is written once, processes may race, and nothing is ever stale. What runs is
the text that was generated, never what happens to lie on the disk: the file is there to be read, by people, debuggers and
`inspect` (which Triton uses), and is put right when it differs.
"""

from __future__ import annotations

import hashlib
import linecache
import logging
import sys
import tempfile
import threading
import types
from pathlib import Path

from sparsify import folders
from sparsify.errors import CacheFolderError
from sparsify.folders import cache_folder

log = logging.getLogger(__name__)

_DIGEST_DIGITS = 16

_lock = threading.Lock()
_modules: dict[str, types.ModuleType] = {}
_private: tempfile.TemporaryDirectory[str] | None = None


def load(text: str, stem: str) -> types.ModuleType:
    """Imports `text` as a module from the file `<stem>_<sha>.py` in the cache folder; the same text gives the same module.

    Args:
        text: Python source.
        stem: an identifier that says what the text is; the start of the file's name.

    Raises:
        CacheFolderError: the folder is a symbolic link, belongs to someone else, or others may write to it; or neither it nor a
            private temporary folder can be written.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]
    path = write_text(text, f"{stem}_{digest}.py")
    with _lock:
        module = _modules.get(str(path))
        if module is None:
            module = _modules[str(path)] = _execute(text, path)
    return module


def _execute(text: str, path: Path) -> types.ModuleType:
    module = types.ModuleType(f"sparsify_generated.{path.stem}")
    module.__file__ = str(path)
    # an entry without a modification time is never refreshed, so inspect sees exactly what runs
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def write_text(text: str, name: str) -> Path:
    """The path of a file that holds `text`, in the cache folder or, when that cannot be written, in a private temporary one."""
    global _private
    folder: Path | None = None
    if _private is None:
        try:
            folder = cache_folder()
            folders.secure(folder)
            return _write(text, folder / name)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder can be found
            log.warning("generated code goes to a temporary folder: %s cannot be used: %s", folder or "the cache folder", error)
    try:
        if _private is None:
            _private = tempfile.TemporaryDirectory(prefix="sparsify-")
        return _write(text, Path(_private.name) / name)
    except OSError as error:
        hint = "set SPARSIFY_CACHE_DIR to a folder that you can write"
        raise CacheFolderError(f"no folder for generated code can be written: {error}", where=str(folder or name), hint=hint) from error


def _write(text: str, path: Path) -> Path:
    """Writes atomically, so that a racing process sees no file or a whole one; a file that already holds `text` is left alone."""
    data = text.encode()
    try:
        if not path.is_symlink() and path.read_bytes() == data:
            return path
        log.warning("%s did not hold the code that was generated for it: rewritten", path)
    except FileNotFoundError:
        pass
    folders.write(text, path)
    return path
