"""A plan as one HTML page that loads nothing: the template beside this file, filled with `data.page`."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from typing import TYPE_CHECKING

from sparsify.planning.page import data
from sparsify.planning.report import LETTERS

if TYPE_CHECKING:
    from jinja2 import Template


def render(plan: data.Described, title: str = "") -> str:
    """The page's text. Everything that comes from a model or a plan is escaped.

    Args:
        title: what was looked at, such as the model's name.
    """
    from markupsafe import Markup

    script = _file("page.js")
    # the page may run this script and no other, whatever else got into it
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": Markup(_file("page.css")), "script": Markup(script), "digest": digest}
    return _template().render(page=data.page(plan, title), kinds=data.KINDS, letters=LETTERS, **own)


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html.j2"))


def _file(name: str) -> str:
    return (resources.files("sparsify.planning.page") / name).read_text(encoding="utf-8")
