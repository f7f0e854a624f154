"""The part of docs/support.md that says what the matrix checks."""

from __future__ import annotations

from benchmarks.lib.pages import filled
from tests.models import matrix_images, matrix_padding, matrix_tokens
from tests.models.matrix import BROKEN, BY_TOKEN, DOCS, REFUSED, Broken, Cell, Refused, attentions
from tests.models.matrix_modes import MODES
from tests.support.tiny_models import CORE_FAMILIES, FAMILIES


def page() -> str:
    """The whole text of docs/support.md, with that part renewed."""
    return filled(DOCS.read_text(), "matrix", _part())


def _part() -> str:
    notes: list[str] = []
    lines = ["| family | attention | " + " | ".join(m.title for m in MODES.values()) + " |"]
    lines.append("|---|---|" + ":-:|" * len(MODES))
    for family in FAMILIES:
        for attention in attentions(family):
            marks = [_mark(Cell(family, attention, mode, "keep_all"), notes) for mode in MODES]
            lines.append(f"| {family} | {attention} | " + " | ".join(marks) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    older = sorted({(e.release, e.families, e.modes.replace("|", ", "), e.because) for e in (*REFUSED, *BROKEN) if e.release})
    if older:
        lines += ["Only in older releases of transformers:", ""]
        lines += [f"- {release}, {families}, {modes}: {because}" for release, families, modes, because in older]
        lines.append("")
    lines += [
        f"The sparse runs force `xattention` everywhere but in {', '.join(BY_TOKEN)}, where they force `sink_window`: softcap, sink logits",
        "and alibi are outside `xattention`'s estimate, which says so and leaves those sites to the next method. Families that the first",
        f"release promises: {', '.join(CORE_FAMILIES)}.",
    ]
    return "\n".join([*lines, "", *_tokens(), "", *_images(), "", *_padding()])


def _tokens() -> list[str]:
    """Which families let tokens go on alone behind a layer."""
    reasons: dict[str, list[str]] = {}
    for family, (_, because) in matrix_tokens.REFUSED.items():
        reasons.setdefault(because, []).append(family)
    return [
        "`token_select` (a prompt, a token, a second turn; against an eager model whose later layers hide what was left out): "
        f"{', '.join(matrix_tokens.SERVED)}. Refused, and then dense: "
        + "; ".join(f"{', '.join(of)} ({why})" for why, of in reasons.items())
        + ".",
    ]


def _images() -> list[str]:
    """Which families let image tokens leave."""
    refused = "; ".join(f"{family} ({because})" for family, (_, because) in matrix_images.REFUSED.items())
    return [
        "`fastv` and `divprune` (a prompt with an image, a token, a second turn; against an eager model that hides what was left out): "
        f"{', '.join(matrix_images.SERVED)}. Refused, and then dense: {refused}.",
    ]


def _padding() -> list[str]:
    """Which families pack a padded batch."""
    (because,) = {*matrix_padding.REFUSED.values()}
    return [
        "`unpad` (a padded prompt, a token, a second turn, padding on either side; against eager execution): "
        f"{', '.join(matrix_padding.SERVED)}. Not packed: {', '.join(matrix_padding.REFUSED)} ({because}).",
    ]


def _mark(cell: Cell, notes: list[str]) -> str:
    broken = next((b for b in BROKEN if not b.release and b.is_about(cell)), None)
    if broken is not None:
        return "–" + _note(broken, notes)
    refused = [r for r in REFUSED if not r.release and r.is_about(cell)]
    if not refused:
        return "●"
    return ("○" if any(r.sites == "all" for r in refused) else "◐") + "".join(_note(r, notes) for r in refused)


def _note(entry: Refused | Broken, notes: list[str]) -> str:
    if entry.because not in notes:
        notes.append(entry.because)
    return f" {notes.index(entry.because) + 1}"
