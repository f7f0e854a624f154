"""Kernel text from a template: `%if`, `%elif`, `%else` and `%end` lines choose lines, `${...}` fills in an expression."""

from __future__ import annotations

import re
from collections.abc import Mapping

_DIRECTIVE = re.compile(r"\s*%(if|elif|else|end)\b\s*(.*)$")
_FIELD = re.compile(r"\$\{([^{}]*)\}")


def render(template: str, values: Mapping[str, object]) -> str:
    """The template's lines whose conditions hold, with fields filled in. Conditions and fields are Python expressions over `values`.

    Raises:
        ValueError: directives do not nest; the message names the line.
        NameError: a condition or a field asks for a value that is not there.
    """
    names = {"__builtins__": {"min": min, "max": max}, **values}
    lines: list[str] = []
    # one (a branch was taken, this branch is on) per open %if
    open_ifs: list[tuple[bool, bool]] = []
    for number, line in enumerate(template.splitlines(), 1):
        directive = _DIRECTIVE.match(line)
        if directive is None:
            if all(on for _, on in open_ifs):
                lines.append(_FIELD.sub(lambda field: str(eval(field[1], names)), line))
            continue
        word, condition = directive.groups()
        if word == "if":
            on = bool(eval(condition, names))
            open_ifs.append((on, on))
        elif not open_ifs:
            raise ValueError(f"line {number}: %{word} without %if")
        elif word == "end":
            open_ifs.pop()
        else:
            taken = open_ifs[-1][0]
            on = not taken and (word == "else" or bool(eval(condition, names)))
            open_ifs[-1] = (taken or on, on)
    if open_ifs:
        raise ValueError("%if without %end")
    return "\n".join(lines) + "\n"
