"""Lays out the site's pages in a folder of their own, from which MkDocs builds it: docs/, and every other file to which a page links.

    python tools/site/pages.py build/pages

Pages are written to be read in the repository, and links are rewritten for the site: README.md becomes its front page, every other file
lies below `repository/`, Markdown as a page, Python as a page that shows it, anything else as it is. Links to folders lead to their
README.md; where there is none, the words stay without a link. Beside the pages goes the script by which search works in a folder, without a
server.
"""

from __future__ import annotations

import os.path
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z]+:|#|/")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def lay_out(folder: Path) -> list[Path]:
    """Writes the folder anew; returns the files of the repository that are in it."""
    shutil.rmtree(folder, ignore_errors=True)
    ahead = [HOME, *(path for path in DOCS.rglob("*") if path.is_file())]
    done: set[Path] = set()
    while ahead:
        source = ahead.pop()
        if source in done:
            continue
        done.add(source)
        to = folder / place(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            to.write_text(rewritten(source), encoding="utf-8")
            ahead += targets(source)
        elif source.suffix == ".py":
            name = source.relative_to(ROOT).as_posix()
            to.write_text(f"# {name}\n\n```python\n{source.read_text(encoding='utf-8')}```\n", encoding="utf-8")
        else:
            shutil.copyfile(source, to)
    script = Path(__file__).with_name("iframe-worker.js")
    (folder / "assets").mkdir()
    shutil.copyfile(script, folder / "assets" / script.name)
    return sorted(done)


def place(source: Path) -> str:
    """Where a file of the repository stands among the site's pages."""
    if source == HOME:
        return "index.md"
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    name = f"repository/{source.relative_to(ROOT).as_posix()}"
    return name.removesuffix(".py") + ".md" if source.suffix == ".py" else name


def targets(source: Path) -> list[Path]:
    """Files of the repository to which a page links. What does not exist is MkDocs' to complain about."""
    found = (_target(source, link[3]) for link in _LINK.finditer(_FENCE.sub("", source.read_text(encoding="utf-8"))))
    return [target for target in found if target is not None]


def rewritten(source: Path) -> str:
    """A page's text with the site's links; what stands in fences is no link."""
    parts = _FENCE.split(source.read_text(encoding="utf-8"))
    return "".join(part if number % 2 else _LINK.sub(lambda link: _link(link, source), part) for number, part in enumerate(parts))


def _target(source: Path, link: str) -> Path | None:
    if _ELSEWHERE.match(link):
        return None
    target = (source.parent / link.partition("#")[0]).resolve()
    if target.is_dir():
        target /= "README.md"
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _link(link: re.Match[str], source: Path) -> str:
    image, words, to = link[1], link[2], link[3]
    path, mark, anchor = to.partition("#")
    if _ELSEWHERE.match(to):
        return link[0]
    target = _target(source, to)
    if target is None:
        return words if (source.parent / path).is_dir() else link[0]
    words = _LINK.sub(lambda inner: _link(inner, source), words)
    return f"{image}[{words}]({os.path.relpath(place(target), Path(place(source)).parent)}{mark}{anchor})"


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
