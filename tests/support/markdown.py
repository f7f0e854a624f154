"""What a page of Markdown holds: fences, links, anchors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PARSER = MarkdownIt("commonmark").enable("table")
_COMMENT = re.compile(r"<!-- (.*?) -->\s*")


@dataclass(frozen=True)
class Fence:
    """A block of code. line: of the page, from 1, where the code begins. note: the comment directly before it, empty without one."""

    page: Path
    line: int
    language: str
    code: str
    note: str

    @property
    def is_file(self) -> bool:
        """Whether it begins with the path of the file that it is."""
        return re.match(r"(# |<!-- )[\w/.-]+\.\w+( -->)?\n", self.code) is not None


def tokens(page: Path) -> list[Token]:
    return _PARSER.parse(page.read_text(encoding="utf-8"))


def fences(page: Path) -> Iterator[Fence]:
    before = ""
    for token in tokens(page):
        if token.type == "fence":
            line = (token.map or [0])[0] + 2
            yield Fence(page, line, token.info.strip(), token.content, before)
        comment = _COMMENT.fullmatch(token.content) if token.type == "html_block" else None
        before = comment[1] if comment else ""


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or []:
            to = child.attrGet("href") or child.attrGet("src")
            if to:
                yield str(to)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    found: set[str] = set()
    parsed = tokens(page)
    for opening, inline in itertools.pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return found
