"""Generated code is loaded only from a folder that nobody else can write, and runs exactly as generated."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import sparsify.backends.codegen.source as source
from sparsify.errors import CacheFolderError

TEXT = "def answer():\n    return 42\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(path))
    monkeypatch.setattr(source, "_modules", {})
    monkeypatch.setattr(source, "_private", None)
    return path


def test_loads_what_was_generated(folder):
    module = source.load(TEXT, "attention")
    assert module.answer() == 42
    assert inspect.getsource(module.answer) == TEXT
    (file,) = folder.iterdir()
    assert file.name.startswith("attention_") and file.suffix == ".py"
    assert file.read_text() == TEXT
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


def test_same_text_same_module_other_text_other_file(folder):
    assert source.load(TEXT, "a") is source.load(TEXT, "a")
    assert source.load(TEXT.replace("42", "43"), "a").answer() == 43
    assert len(list(folder.iterdir())) == 2


def test_corrupted_file_is_rewritten_and_never_run(folder, caplog):
    source.load(TEXT, "a")
    (file,) = folder.iterdir()
    file.write_text("raise SystemExit('not ours')\n")
    source._modules.clear()
    with caplog.at_level(logging.WARNING):
        assert source.load(TEXT, "a").answer() == 42
    assert file.read_text() == TEXT
    assert "rewritten" in caplog.text


def test_symlinked_file_is_replaced_not_followed(folder, tmp_path):
    source.load(TEXT, "a")
    (file,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(TEXT)
    file.unlink()
    file.symlink_to(elsewhere)
    source._modules.clear()
    source.load(TEXT, "a")
    assert not file.is_symlink() and elsewhere.read_text() == TEXT


def test_module_that_fails_leaves_no_trace():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            source.load("1 / 0\n", "bad")
    assert not any("bad_" in name for name in sys.modules)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheFolderError, match="chmod 700"):
        source.load(TEXT, "a")
    assert not list(folder.iterdir())


def test_readable_by_others_is_fine(folder):
    folder.mkdir(mode=0o755)
    assert source.load(TEXT, "a").answer() == 42


def test_symlinked_folder_is_refused(folder, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "real")
    with pytest.raises(CacheFolderError, match="symbolic link"):
        source.load(TEXT, "a")


def test_plain_file_is_refused(folder):
    folder.write_text("")
    with pytest.raises(CacheFolderError, match="not a folder"):
        source.load(TEXT, "a")


def test_folder_of_another_user_is_refused(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(CacheFolderError, match="another user"):
        source.load(TEXT, "a")


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_unwritable_folder_falls_back_to_a_private_one(folder, monkeypatch, caplog, code):
    real = tempfile.mkstemp

    def mkstemp(*args, dir, **kwargs):
        if Path(dir) == folder:
            raise OSError(code, os.strerror(code))
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with caplog.at_level(logging.WARNING):
        module = source.load(TEXT, "a")
        source.load(TEXT + "\n", "a")
    assert module.answer() == 42
    private = Path(module.__file__).parent
    assert private != folder and stat.S_IMODE(private.stat().st_mode) == 0o700
    assert caplog.text.count("temporary folder") == 1


def test_disk_full_leaves_no_half_file(folder, monkeypatch):
    def replace(self, target):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(CacheFolderError, match="disk full"):
        source.load(TEXT, "a")
    assert not list(folder.iterdir())


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSIFY_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source.cache_folder() == tmp_path / "xdg" / "sparsify"
    for ignored in ("relative/path", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert source.cache_folder() == tmp_path / ".cache" / "sparsify"


@pytest.mark.slow
def test_processes_may_race(folder):
    code = f"import sparsify.backends.codegen.source as s; assert s.load({TEXT!r}, 'race').answer() == 42"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [file.suffix for file in folder.iterdir()] == [".py"]
