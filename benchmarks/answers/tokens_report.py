"""Needles answered where few tokens of a prompt go on: the table."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.answers import TokenAnswers
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, conditions, failure, groups, latest, markdown, size

_WHAT = {
    "eager": "eager, all tokens",
    "narrow": "go on behind the layer",
    "prompt": 'read anew (`mode = "prompt"`)',
    "retrieve": "`sparsify.retrieve`",
    "skip_layers": "bypass layers while answering",
}


def table(found: Iterable[Found]) -> str:
    """One table a model and device, one row a choice, one column a length."""
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
            f"{conditions(group)} Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(
            head + "\n\n" + markdown(["tokens", "chosen by, or bypassed", "kept", *(f"{size(length)} bytes" for length in lengths)], rows)
        )
    return "\n\n".join(parts)


def _name(record: Found) -> tuple[str, str, str]:
    parameters = record["parameters"]
    if not parameters:
        return _WHAT[record["method"]], "", "all"
    if "bypassed" in parameters:
        first, count = parameters["first"], parameters["bypassed"]
        return _WHAT[record["method"]], f"layers {first} to {first + count - 1}" if count > 1 else f"layer {first}", "all"
    heads = "all heads" if parameters["heads"] == "all" else f"heads {', '.join(map(str, parameters['heads']))}"
    pieces = f", pieces of {size(parameters['chunk'])}" if "chunk" in parameters else ""
    return _WHAT[record["method"]] + pieces, f"layer {parameters['layer']}, {heads}", str(parameters["keep"])


def _rank(record: Found) -> tuple[int, int, str, int]:
    parameters = record["parameters"]
    if "bypassed" in parameters:
        return [*_WHAT].index(record["method"]), parameters["first"], "", parameters["bypassed"]
    return [*_WHAT].index(record["method"]), parameters.get("layer", 0), str(parameters.get("heads", "")), parameters.get("keep", 0)


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
        measures="needles answered where few tokens go on behind a layer, are read anew or retrieved, or bypass layers",
        module="benchmarks.answers.tokens",
        records=(TokenAnswers,),
        title="Answers from few tokens",
        table=table,
    ),
)
