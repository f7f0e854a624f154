"""Kernel text from a template: `%if`, `%elif`, `%else` and `%end` lines choose lines, `${...}` fills in an expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_DIRECTIVE = re.compile(r"\s*%(if|elif|else|end)\b\s*(.*)$")
_FIELD = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True)
class Argument:
    """A kernel argument. type: as Triton writes it. aligned: a multiple of 16 in ordinary calls, which Triton specialises on."""

    name: str
    type: str
    aligned: bool = False


def parameters(arguments: Iterable[Argument]) -> str:
    """The arguments as a kernel's signature lists them, one a line."""
    return ",\n    ".join(a.name + (": tl.constexpr" if a.type == "constexpr" else "") for a in arguments)


def padded(size: int) -> int:
    """The tile dimension that holds `size`: a power of two, at least 16, as `tl.dot` wants it."""
    return max(16, 1 << (size - 1).bit_length())


def render(template: str, values: Mapping[str, object]) -> str:
    """The template's lines whose conditions hold, with fields filled in. Conditions and fields are Python expressions over `values`.

    Raises:
        ValueError: directives do not nest; the message names the line.
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
