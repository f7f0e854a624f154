"""Generated parts of pages that people write."""

from __future__ import annotations


def filled(text: str, name: str, part: str) -> str:
    """`text` with `part` between `<!-- name -->` and `<!-- /name -->`. Raises ValueError where the marks are not there once each."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{begin} and {end} have to be there once each, in this order")
    return f"{text[: text.index(begin)]}{begin}\n{part}\n{text[text.index(end) :]}"
