"""The part of docs/support.md about every model type of transformers, from the records of the sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.test_runs import Sweep
from sparsify.commands.bench.tables import Found, commit, groups, kind, latest, markdown

TITLES = {  # of the lists in tests/sweep/lists.py
    "causal": "causal language models",
    "multimodal": "language models with images and sound",
    "masked": "encoders (masked language models)",
    "seq2seq": "encoder-decoders",
    "speech": "speech to text",
}
# columns, and which verdicts each counts
_COLUMNS = {
    "whole": {"whole"},
    "partly": {"partly"},
    "refused": {"refused"},
    "no attention": {"none"},
    "wrong": {"wrong", "crashed", "fell back"},
    "fails": {"fails", "late", "died"},
    "not built": {"not built"},
}
_MOST_NAMED = 12  # types in one cell
_MISSED = "no site was found for an attention"
_BAD = _COLUMNS["wrong"] | _COLUMNS["fails"]
# what differs between runs of one kind, and what stands for it
_ALIKE = (
    (re.compile(r"\w+ (is written while the mask is made)(?:, and read by its values: \w+ \1)?"), r"a tensor \1"),
    (re.compile(r"^late: after \d+ s$"), "late: out of processor time"),
)


def part(found: Iterable[Found]) -> str:
    """The newest release of transformers in full; of every older one its counts and what is otherwise there."""
    releases = groups(kind(found, Sweep), lambda one: one["machine"]["transformers"])
    by_release = sorted((_cells(same) for same in releases), key=lambda cells: _order(_release(cells)), reverse=True)
    if not by_release:
        return "No results are recorded yet."
    newest, *older = by_release
    return "\n\n".join([_newest(newest), *(_older(cells, newest) for cells in older)])


def _cells(found: Iterable[Found]) -> list[Found]:
    """The last record of each type, in the order of the tables."""
    return sorted(latest(found, Sweep), key=lambda one: (list(TITLES).index(one["task"]), one["attention"] != "sdpa", one["model"]))


def _newest(cells: Sequence[Found]) -> str:
    """Counts by list, why sites are left, and which types were not called whole."""
    tables = [f"### transformers {_release(cells)}", _counts(cells), "Why attentions are left as they are:", _reasons(cells, _refusals)]
    if any(_failures(one) for one in cells):
        tables += ["Runs that failed:", _reasons(cells, _failures)]
    if unrun := [one for one in cells if one.get("unrun")]:
        kinds = groups(unrun, lambda one: (one["task"], one["attention"], *one["unrun"]))
        said = [f"{len(same)} {TITLES[same[0]['task']]} ({same[0]['attention']}) without {', '.join(same[0]['unrun'])}" for same in kinds]
        tables.append(f"Not every run was made: {'; '.join(said)}.")
    if without := _named((one["model"] for one in cells if one["verdict"] == "none"), most=None):
        tables.append(f"No attention was seen in: {without}.")
    if decoders := _named(one["model"] for one in cells if one.get("part")):
        tables.append(f"Of these only the language decoder was called, by itself: {decoders}.")
    if seeing := _named((one["model"] for one in cells if one.get("sees")), most=None):
        tables.append(f"Called with images and their tokens: {seeing}.")
    notes = groups((one for one in cells if one["verdict"] == "not built"), lambda one: one["note"])
    if notes:
        rows = [[_named(one["model"] for one in same), _cell(same[0]["note"])] for same in notes]
        tables += ["Not built:", markdown(["types", "why"], rows)]
    return "\n\n".join([*tables, _versions(cells)])


def _older(cells: Sequence[Found], newest: Sequence[Found]) -> str:
    """Counts by list, and the types that have another verdict than under the newest release."""
    later = {_name(one): one for one in newest}
    rows = [
        [
            one["model"],
            one["attention"],
            later[_name(one)]["verdict"] if _name(one) in later else "not listed",
            one["verdict"],
            _cell(_why(one)),
        ]
        for one in cells
        if _name(one) not in later or later[_name(one)]["verdict"] != one["verdict"]
    ]
    mine, other = _release(cells), _release(newest)
    tables = [f"### transformers {mine}", _counts(cells)]
    if rows:
        tables += [
            f"What of it is otherwise than under {other}:",
            markdown(["type", "attention", f"under {other}", f"under {mine}", "why"], rows),
        ]
    else:
        tables.append(f"Every type that was run has the verdict that it has under {other}.")
    return "\n\n".join([*tables, _versions(cells)])


def _name(one: Found) -> tuple[str, str, str]:
    return one["task"], one["model"], one["attention"]


def _why(one: Found) -> str:
    return one.get("note") or "; ".join(dict.fromkeys([*_refusals(one), *_failures(one)]))


def _release(cells: Sequence[Found]) -> str:
    return str(cells[0]["machine"]["transformers"])


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release))


def _counts(cells: Sequence[Found]) -> str:
    rows = []
    for same in groups(cells, lambda one: (list(TITLES).index(one["task"]), one["attention"] != "sdpa", one["trained"])):
        verdicts = Counter(one["verdict"] for one in same)
        trained = ", trained sparsity" if same[0]["trained"] else ""
        counts = [sum(verdicts[name] for name in names) for names in _COLUMNS.values()]
        sparse = sum(any(run.get("sparse") == "agrees" for run in one["found"].values()) for one in same)
        shown = [str(count or "–") for count in (len(same), *counts, sparse)]
        rows.append([TITLES[same[0]["task"]] + trained, same[0]["attention"], *shown])
    return markdown(["list", "attention", "types run", *_COLUMNS, "sparse as the oracle"], rows)


def _reasons(cells: Sequence[Found], of: Callable[[Found], list[str]]) -> str:
    types: dict[tuple[bool, str], set[str]] = {}
    for one in cells:
        for reason in of(one):
            types.setdefault((one["trained"], reason), set()).add(one["model"])
    order = sorted(types, key=lambda key: (key[0], -len(types[key]), key[1]))
    rows = [[_cell(key[1]), str(len(types[key])), _named(types[key]) + (" (trained sparsity)" if key[0] else "")] for key in order]
    return markdown(["reason", "types", "which"], rows)


def _refusals(one: Found) -> list[str]:
    """Why sites of one type were left."""
    runs = one["found"].values()
    return [_alike(reason) for run in runs for reason in (*run.get("reasons", ()), *([_MISSED] if run.get("missed") else ()))]


def _failures(one: Found) -> list[str]:
    """The runs of one type that failed or were wrong, and how."""
    return [_alike(f"{run['verdict']}: {run.get('note', '')}") for run in one["found"].values() if run["verdict"] in _BAD]


def _alike(text: str) -> str:
    for pattern, instead in _ALIKE:
        text = pattern.sub(instead, text)
    return text


def _named(models: Iterable[str], most: int | None = _MOST_NAMED) -> str:
    names = sorted(set(models))
    more = f" and {len(names) - most} more" if most and len(names) > most else ""
    return ", ".join(names[:most]) + more


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 160 else text[:157] + "…"


def _versions(cells: Sequence[Found]) -> str:
    parts = [f"{name} {', '.join(sorted({str(one['machine'][name]) for one in cells}))}" for name in ("torch", "transformers")]
    days = sorted({one["time"][:10] for one in cells})
    commits = sorted(set(map(commit, cells)))
    return f"{'; '.join(parts)}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."
