"""Answers where few tokens of a prompt go on, or an answer's tokens leave out layers: the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.answers import TokenAnswers
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, conditions, failure, groups, latest, markdown, size

_WHAT = {
    "eager": "eager, all tokens",
    "narrow": "go on behind the layer",
    "prompt": 'read anew (`mode = "prompt"`)',
    "retrieve": "`sparsify.retrieve`",
    "skip_layers": "bypass layers while answering (`skip_layers`)",
    "ffn_skip": "leave out feed-forward blocks while answering (`ffn_skip`)",
}
_LOST = 1 / 48  # of dense attention's answers, that a choice may lose


def table(found: Iterable[Found]) -> str:
    """Two tables a model and device: the earliest layers that keep the answers, and one row a choice, one column a length."""
    parts = []
    for group in groups(
        latest(found, TokenAnswers),
        lambda r: (*(r[key] for key in ("model", "model_sha256", "text_sha256", "needles", "dtype")), r["machine"]["gpu"] or "CPU"),
    ):
        lengths = sorted({record["length"] for record in group})
        named = {_name(record): _rank(record) for record in group}
        rows = []
        for name in sorted(named, key=named.__getitem__):
            by_length = {record["length"]: record for record in group if _name(record) == name}
            rows.append([*name, *(_cell(by_length.get(length)) for length in lengths)])
        first = group[0]
        head = (
            f"### {first['model']} ({first['dtype']}), {first['needles']} needles a prompt\n\n"
            "Of the first question, which chooses the tokens, answers right; after the stroke those of later questions, one a turn. "
            "*All asked*: every question stands behind the context before the first one is asked, and all choose. Columns: tokens of a "
            f"prompt (of a model of bytes, bytes). {conditions(group)} "
            f"Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(head)
        if earliest := _earliest(group, lengths):
            parts.append(earliest)
        parts.append(markdown(["tokens", "chosen by, or left out", "kept", *map(size, lengths)], rows))
    return "\n\n".join(parts)


def _earliest(group: Sequence[Found], lengths: Sequence[int]) -> str:
    """A table: of each way to choose and number of tokens the earliest layer that keeps the answers; empty where several layers chose at no
    length."""
    dense = {(r["length"], r.get("listed")): r for r in group if r["method"] == "eager" and "error" not in r}
    tried: dict[tuple[str, str, int, bool], dict[int, list[Found]]] = {}
    for record in group:
        if record["method"] not in ("narrow", "prompt") or "error" in record or (record["length"], record.get("listed")) not in dense:
            continue
        parameters = record["parameters"]
        how = "all heads" if parameters["heads"] == "all" else "heads that were found" if "held" in parameters else ""
        if how:
            tried.setdefault((_what(record), how, parameters["keep"], bool(record.get("listed"))), {}).setdefault(
                record["length"], []
            ).append(record)
    rows = []
    for (what, how, keep, _), by_length in sorted(
        tried.items(), key=lambda one: (one[0][3], [*_WHAT.values()].index(one[0][0].split(",")[0]), *one[0][1:3])
    ):
        if any(len(records) > 1 for records in by_length.values()):
            rows.append([what, how, str(keep), *(_earliest_cell(by_length.get(length), dense) for length in lengths)])
    if not rows:
        return ""
    layers = next((f" of {record['layers']}" for record in group if record.get("layers")), "")
    words = (
        f"The earliest layer{layers}, from 0, whose choice loses at most one in 48 of the answers that dense attention gives on the same "
        "prompts; after the stroke the same of later questions' answers. *none*: no layer that was tried; *dense*: answers too few."
    )
    return words + "\n\n" + markdown(["tokens", "chosen by", "kept", *map(size, lengths)], rows)


def _earliest_cell(found: Sequence[Found] | None, dense: Mapping[tuple[int, int | None], Found]) -> str:
    if not found:
        return "–"
    eager = dense[found[0]["length"], found[0].get("listed")]
    cells = []
    for right, asked in (("right", "asked"), ("later_right", "later_asked")):
        if right in eager and eager[right] < eager[asked] / 2:
            cells.append(f"dense: {eager[right]} of {eager[asked]}")
        elif all(right in record for record in (*found, eager)):
            kept = [r["parameters"]["layer"] for r in found if r[right] >= eager[right] - _LOST * eager[asked]]
            cells.append(str(min(kept)) if kept else "none")
    return " / ".join(cells)


def _what(record: Found) -> str:
    return _WHAT[record["method"]] + (", all asked" if record.get("listed") else "")


def _name(record: Found) -> tuple[str, str, str]:
    parameters, what = record["parameters"], _what(record)
    if "bypassed" in parameters:
        first, count = parameters["first"], parameters["bypassed"]
        return what, f"layers {first} to {first + count - 1}" if count > 1 else f"layer {first}", "all"
    if "policy" in parameters:
        return what, f"{parameters['policy']}, {parameters['share']:.0%} of the blocks", "all"
    if not parameters:
        return what, "", "all"
    heads = parameters["heads"]
    heads = f"{heads} heads" if isinstance(heads, str) else f"heads {', '.join(map(str, heads))}"
    pieces = f", pieces of {size(parameters['chunk'])}" if "chunk" in parameters else ""
    return what + pieces, f"layer {parameters['layer']}, {heads}", str(parameters["keep"])


def _rank(record: Found) -> tuple[Any, ...]:
    parameters = record["parameters"]
    order = [*_WHAT].index(record["method"]), bool(record.get("listed"))
    if "bypassed" in parameters:
        return *order, parameters["first"], "", parameters["bypassed"]
    if "policy" in parameters:
        return *order, 0, parameters["policy"], parameters["share"]
    return *order, parameters.get("layer", 0), str(parameters.get("heads", "")), parameters.get("keep", 0)


def _cell(record: Found | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return failure(record["error"])
    low, high = record["interval"]
    later = f" / {record['later_right']} of {record['later_asked']}" if "later_asked" in record else ""
    return f"{record['right']} of {record['asked']} [{low:.0%}, {high:.0%}]{later}"


BENCHMARKS = (
    Benchmark(
        name="token_answers",
        place=5,
        measures="facts asked for where few tokens go on behind a layer, are read anew or retrieved, or answers leave out layers or blocks",
        module="benchmarks.answers.tokens",
        records=(TokenAnswers,),
        title="Answers from few tokens",
        table=table,
    ),
)
