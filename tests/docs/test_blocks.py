"""Blocks of code in README.md and docs do what they say.

A page's blocks of Python are one program: they run from top to bottom, on the bundled model, with what `names` gives them. What a line
prints is compared with the comment behind it (`…` stands for anything). `<!-- needs a GPU -->` before a block says why it does not run
elsewhere. Blocks that begin with a path are files, which test_adding follows. Lines of shell are commands that exist, with arguments that
they take.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import registry
from sparsify.commands import main as command_line
from sparsify.planning import registry as methods
from sparsify.planning.config import config
from tests.support import markdown
from tests.support.markdown import ROOT, Fence

GPU = "needs a GPU"
FENCES = [fence for page in markdown.PAGES for fence in markdown.fences(page)]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# these generate, or compile with Inductor
LONG = {"docs/start.md", "docs/recipes.md", "docs/faq.md", "docs/generate.md", "docs/limits.md", "docs/cache.md"}
PROGRAMS = [
    pytest.param(page, marks=pytest.mark.slow) if page in LONG else page
    for page in sorted({named(fence.page) for fence in FENCES if fence.language == "python" and not fence.is_file})
]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that looks like the repository's, quick: no Inductor and no line on the terminal unless a block says so."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "quick.toml").write_text('lower = "eager"\nprogress = false\n')
    monkeypatch.setenv("SPARSIFY_CONFIG", str(tmp_path / "quick.toml"))


def names() -> dict[str, Any]:
    """What every page may use without saying where it comes from."""
    from transformers import AutoModelForCausalLM

    import sparsify

    model = AutoModelForCausalLM.from_pretrained(ROOT / "benchmarks" / "models" / "demo", dtype=torch.float32).eval()
    ids = torch.tensor([list(b"## harbor: 271828\nand so on and on\n?? harbor: ")])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"torch": torch, "sparsify": sparsify, "model": model, "inputs": inputs, "prompt_len": ids.shape[1], "max_new_tokens": 4}


def run(fence: Fence, names: dict[str, Any]) -> None:
    """Executes a block, and compares what its lines print with their comments."""
    lines = fence.code.splitlines()
    for node in ast.parse(fence.code).body:
        ast.increment_lineno(node, fence.line - 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module([node], []), str(fence.page), "exec"), names)
        for part in ast.walk(node):
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "print":
                line = lines[(part.end_lineno or 0) - fence.line]
                if "  # " in line:
                    expected = line.partition("  # ")[2].replace("…", "*").replace("[", "[[]")
                    assert fnmatch.fnmatchcase(printed.getvalue().strip(), expected), f"line {part.lineno} prints {printed.getvalue()!r}"


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_pages_python_runs(page: str) -> None:
    given = names()
    for fence in FENCES:
        if fence.language == "python" and named(fence.page) == page and not fence.is_file:
            if fence.note == GPU and not torch.cuda.is_available():
                ast.parse(fence.code)
            else:
                assert fence.note in ("", GPU), f"{page}:{fence.line}: what does this note mean to the test?"
                run(fence, given)


def test_a_wrong_comment_is_noticed() -> None:
    fence = Fence(ROOT / "x.md", 3, "python", "one = 1\nwith suppress():\n    print(one, [2])  # 1 …\nprint(3)  # 4\n", "")
    with pytest.raises(AssertionError, match="line 6 prints '3"):
        run(fence, {"suppress": contextlib.suppress})


def test_languages_are_known() -> None:
    known = {"python", "sh", "toml", "text", "markdown", "diff"}
    unknown = {f"{named(f.page)}:{f.line}": f.language for f in FENCES if f.language not in known}
    # README.md begins with its two commands, without a language
    assert list(unknown.values()) == ["", ""] and all(place.startswith("README.md") for place in unknown)


def test_settings_are_settings(tmp_path: Path) -> None:
    for fence in (one for one in FENCES if one.language == "toml"):
        read = tomllib.loads(fence.code)
        if not fence.is_file:
            (tmp_path / "some.toml").write_text(fence.code)
            (tmp_path / "plan.json").touch()
            config.load({"config": str(tmp_path / "some.toml")}, method_models=methods.discover())
        else:
            assert read["project"]["entry-points"]


def check(line: str, files: set[str]) -> None:
    """Raises AssertionError for a command that is not there, or that does not take its arguments. files: that the page itself brings."""
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if not words or words[0] == "source":
        return
    program, arguments = words[0], words[1:]
    if program == "sparsify":
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                command_line._parser().parse_args(arguments)
            except SystemExit:
                raise AssertionError(f"{line}: {said.getvalue()}") from None
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program == "pip":
        extras = re.search(r"sparsify-compiler\[([\w,]+)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras is None or set(extras[1].split(",")) <= set(known), line
    elif program in ("python", ".venv/bin/python"):
        check_python(line, arguments, files)
    else:
        raise AssertionError(f"{line}: what is {program}?")


def check_python(line: str, arguments: list[str], files: set[str]) -> None:
    if not arguments:
        return
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).exists(), line
    elif arguments[1] == "pytest":
        assert all((ROOT / word).exists() or word in files for word in arguments[2:] if "/" in word), line
    elif arguments[1] == "benchmarks":
        assert arguments[2] in ("list", "report") or arguments[3] in {one.name for one in registry.find()}, line
    else:
        module = ROOT.joinpath(*arguments[1].split("."))
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), line


SHELL = [fence for fence in FENCES if fence.language in ("sh", "")]


def test_commands_exist() -> None:
    for fence in SHELL:
        files = {one.code.split("\n")[0].removeprefix("# ") for one in FENCES if one.page == fence.page and one.is_file}
        for line in fence.code.splitlines():
            check(line, files)


@pytest.mark.parametrize(
    "line",
    [
        "sparsify explan MODEL",
        "sparsify cost MODEL --lenght 4K",
        "make cake",
        "python -m benchmarks run x",
        "pip install 'sparsify-compiler[x]'",
        "ls",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line, set())


# what a command is given beside what the page says, to run in seconds
SHORT = {
    "bench": ["--lengths", "1K"],
    "calibrate attention": ["--lengths", "512"],
    "calibrate patterns": ["--lengths", "512", "-o", "minference.columns=[0,128]", "-o", "minference.diagonals=[0,128]"],
    "calibrate tokens": [*["--prompt-length", "600", "--keep", "200", "--pieces", "1", "--keep-error", "100"], "-o", 'passes=["dense"]'],
}


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that only look, and the calibrations, on the bundled model and a short text."""
    monkeypatch.setenv("SPARSIFY_CONFIG", "")
    monkeypatch.delenv("SPARSIFY_CONFIG")
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").encode("ascii", "ignore").decode()[:4000])
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": str(ROOT / "benchmarks" / "models" / "demo"), "FILE": str(text), "4K..1M": "1K..4K"}
    ran = []
    for line in (line for fence in SHELL for line in fence.code.splitlines()):
        words = [given.get(word, word) for word in shlex.split(line, comments=True)]
        if words[:1] == ["sparsify"] and words[1] != "eval":
            words += SHORT.get(" ".join(words[1:3]) if words[1] == "calibrate" else words[1], [])
            assert command_line.main(words[1:]) == 0, f"{line}: {capsys.readouterr()}"
            ran.append(words[1])
    assert {"cost", "calibrate"} <= set(ran)
