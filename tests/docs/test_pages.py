"""Links lead somewhere, generated pages are current, decisions and methods have their place."""

from __future__ import annotations

import functools
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tests.docs import command_page
from tests.support import markdown

ROOT = markdown.ROOT
anchors = functools.cache(markdown.anchors)


def broken(page: Path) -> list[str]:
    found = []
    for link in markdown.links(page):
        if ":" in link.split("/")[0]:
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


def test_links_of_pages_lead_somewhere() -> None:
    assert {page.name: links for page in markdown.PAGES if (links := broken(page))} == {}


def test_no_page_holds_marks_of_a_merge() -> None:
    assert [page.name for page in markdown.PAGES if "\n<<<<<<< " in page.read_text() or "\n>>>>>>> " in page.read_text()] == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `[One]` and two\n[a](page.md#one-and-two) [b](#three) ![c](absent.png) [d](https://example.org/x) `[e](f)`\n")
    assert broken(page) == ["#three", "absent.png"]


def test_the_command_line_page_is_current() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == command_page.page()


def test_the_site_has_every_page() -> None:
    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in pages(one)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in written if not page.startswith("decisions/0")} <= set(named)


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = (folder / "README.md").read_text()
    assert [page.name for page in folder.glob("0*.md") if f"]({page.name})" not in listed] == []


@pytest.mark.parametrize("method", sorted(p.stem for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__"))
def test_every_method_has_a_page(method: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    assert f"configuration.md#{method})" in text
    for part in ("**When it helps.**", "**What it risks.**"):
        assert part in text
