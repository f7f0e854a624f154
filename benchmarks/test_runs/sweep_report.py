"""The part of docs/support.md about every model type of transformers, from the records of the sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.lib.tables import Found, groups, latest, markdown, short
from benchmarks.test_runs import Sweep

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


def part(found: Iterable[Found]) -> str:
    """Counts by list, why sites are left, and which types were not called whole."""
    cells = sorted(latest(found, Sweep), key=lambda one: (list(TITLES).index(one["task"]), one["attention"] != "sdpa", one["model"]))
    if not cells:
        return "No results are recorded yet."
    tables = [_counts(cells), "Why attentions are left as they are:", _reasons(cells)]
    if unrun := [one for one in cells if one.get("unrun")]:
        kinds = groups(unrun, lambda one: (one["task"], one["attention"], *one["unrun"]))
        said = [f"{len(same)} {TITLES[same[0]['task']]} ({same[0]['attention']}) without {', '.join(same[0]['unrun'])}" for same in kinds]
        tables.append(f"Not every run was made: {'; '.join(said)}.")
    if decoders := _named(one["model"] for one in cells if one.get("part")):
        tables.append(f"Of these only the language decoder was called, by itself: {decoders}.")
    if seeing := _named((one["model"] for one in cells if one.get("sees")), most=None):
        tables.append(f"Called with images and their tokens: {seeing}.")
    notes = groups((one for one in cells if one["verdict"] == "not built"), lambda one: one["note"])
    if notes:
        rows = [[_named(one["model"] for one in same), _cell(same[0]["note"])] for same in notes]
        tables += ["Not built:", markdown(["types", "why"], rows)]
    return "\n\n".join([*tables, _versions(cells)])


def _counts(cells: Sequence[Found]) -> str:
    rows = []
    for same in groups(cells, lambda one: (list(TITLES).index(one["task"]), one["attention"] != "sdpa", one["trained"])):
        verdicts = Counter(one["verdict"] for one in same)
        trained = ", trained sparsity" if same[0]["trained"] else ""
        counts = [sum(verdicts[name] for name in names) for names in _COLUMNS.values()]
        sparse = sum(any(run.get("sparse") == "agrees" for run in one["found"].values()) for one in same)
        shown = [str(count or "–") for count in (len(same), *counts, sparse)]
        rows.append([TITLES[same[0]["task"]] + trained, same[0]["attention"], *shown])
    return markdown(["types", "attention", "all", *_COLUMNS, "sparse as the oracle"], rows)


def _reasons(cells: Sequence[Found]) -> str:
    types: dict[tuple[bool, str], set[str]] = {}
    for one in cells:
        for run in one["found"].values():
            for reason in (*run.get("reasons", ()), *(["no site was found for an attention"] if run.get("missed") else ())):
                types.setdefault((one["trained"], reason), set()).add(one["model"])
            if run["verdict"] in _COLUMNS["wrong"] | _COLUMNS["fails"]:
                types.setdefault((one["trained"], f"{run['verdict']}: {run.get('note', '')}"), set()).add(one["model"])
    order = sorted(types, key=lambda key: (key[0], -len(types[key]), key[1]))
    rows = [[_cell(key[1]), str(len(types[key])), _named(types[key]) + (" (trained sparsity)" if key[0] else "")] for key in order]
    return markdown(["reason", "types", "which"], rows)


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
    commits = sorted({short(one["machine"].get("commit") or "unknown") for one in cells})
    return f"{'; '.join(parts)}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."
