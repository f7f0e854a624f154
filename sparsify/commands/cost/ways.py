"""GPUs that share a model by heads, by prompts or by both, compared; and which is the fastest for a prompt and the tokens after it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify.commands.cost import report
from sparsify.commands.cost.forecaster import Forecaster
from sparsify.commands.cost.records import Forecast, Side
from sparsify.costs import links
from sparsify.costs.links import Sharing
from sparsify.errors import UnsupportedError

_COLUMNS = (
    *("length", "shared by", "prefill", "× one GPU", "ms/token", "× one GPU", "prompt and\ntokens", "sent by\na GPU", "waited for"),
    *("peak GB\nof a GPU", ""),
)


@dataclass(frozen=True)
class Ways:
    """Forecasts of the same prompts, the first of one GPU.

    forecasts: one for each way, in order of `sharings`.
    generated: tokens after each prompt.
    memory: bytes of one GPU.
    """

    sharings: tuple[Sharing, ...]
    forecasts: tuple[Forecast, ...]
    generated: int
    memory: float

    def side(self, way: int, row: int) -> Side:
        """What the configuration chooses."""
        return self.forecasts[way].rows[row].chosen

    def fits(self, way: int, row: int) -> bool:
        return self.side(way, row).memory.peak <= self.memory

    def seconds(self, way: int, row: int) -> float:
        """Of a prompt and the tokens after it."""
        side = self.side(way, row)
        return side.prefill.total + self.generated * side.decode.total

    def best(self, row: int) -> int | None:
        """The way of several GPUs that takes the fewest seconds of those that fit in memory; None where none does."""
        fit = [way for way in range(1, len(self.sharings)) if self.fits(way, row)]
        return min(fit, key=lambda way: self.seconds(way, row), default=None)


def compare(asked: Forecaster, lengths: Iterable[int], gpus: int, generated: int, memory: float) -> Ways:
    """Raises UnsupportedError where the model cannot be captured, or has no attention whose heads could be told."""
    lengths = tuple(lengths)
    alone = asked.forecast(lengths)
    heads = asked.kv_heads(lengths)
    if not heads:
        raise UnsupportedError("no attention that the compiler sees: nothing to share by heads or by prompts", where=asked.model.name)
    sharings = links.ways(gpus, heads)
    shared = tuple(asked.shared(sharing).forecast(lengths) for sharing in sharings)
    return Ways((links.ALONE, *sharings), (alone, *shared), generated, memory)


def cells(found: Ways, row: int, way: int) -> tuple[str, ...]:
    """One line of the table, as text."""
    side, one = found.side(way, row), found.side(0, row)
    sent = sum(side.sent.values())
    verdict = "does not fit" if not found.fits(way, row) else "the fastest" if way == found.best(row) else ""
    return (
        report.length_words(found.forecasts[0].rows[row].length),
        str(found.sharings[way]),
        report.time_words(side.prefill.total),
        f"{one.prefill.total / side.prefill.total:.2f}",
        f"{side.decode.total * 1e3:.2f}",
        f"{side.decode.total / one.decode.total:.2f}",
        report.time_words(found.seconds(way, row)),
        links.shown(sent) if sent else "",
        f"{side.prefill.exchange / side.prefill.total:.1%}" if way else "",
        f"{side.memory.peak / 1e9:.3g}",
        verdict,
    )


def table(found: Ways, width: int | None = 160) -> str:
    """A line for each length and way, then what travels and what the numbers rest on."""
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False)
    first, last = found.forecasts[0], found.forecasts[-1]
    gpus = found.sharings[1].size
    shape = f"{first.model}: {first.parameters / 1e9:.2f} B parameters in {first.dtype}"
    console.print(f"{shape}, {gpus} of {first.device}, a prompt and {found.generated} tokens")
    grid = Table()
    for name in _COLUMNS:
        grid.add_column(name, justify="left" if name in ("shared by", "") else "right")
    for row in range(len(first.rows)):
        for way in range(len(found.sharings)):
            grid.add_row(*cells(found, row, way), end_section=way + 1 == len(found.sharings))
    console.print(grid)
    for line in (*_travels(found), *last.notes):
        console.print(line, soft_wrap=True)
    return text.getvalue().rstrip()


def _travels(found: Ways) -> list[str]:
    """What travels at the longest prompt."""
    row, lines = len(found.forecasts[0].rows) - 1, []
    for way, sharing in enumerate(found.sharings):
        if sent := found.side(way, row).sent:
            parts = ", ".join(f"{what} {links.shown(size)}" for what, size in sent.items())
            lines.append(f"{sharing}: a GPU sends at most {parts} for {report.length_words(found.forecasts[0].rows[row].length)} tokens")
    return lines


def data(found: Ways) -> list[dict[str, Any]]:
    """Every way's forecast, in JSON's types, with how it is shared and whether it is the fastest, by length."""
    result = []
    for way, (sharing, forecast) in enumerate(zip(found.sharings, found.forecasts, strict=True)):
        fastest = [found.best(row) == way for row in range(len(forecast.rows))]
        result.append({**report.data(forecast), "tp": sharing.tp, "cp": sharing.cp, "fastest": fastest})
    return result


def markdown(compared: Sequence[Ways], lengths: Sequence[int]) -> str:
    """Ways of different numbers of GPUs as one table for docs: the fastest of each, and the two pure ones beside it."""
    lines = [
        "| tokens | GPUs | shared by | prefill | × one GPU | ms a token | × one GPU | sent by a GPU | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, _ in enumerate(lengths):
        for number, found in enumerate(compared):
            for way in range(len(found.sharings)):
                if way == 0 and number:
                    continue
                length, shared, prefill, gain, token, ratio, _, sent, _, peak, verdict = cells(found, row, way)
                gpus = str(found.sharings[way].size)
                mark = f"**{shared}**" if verdict == "the fastest" else shared
                lines.append(f"| {length} | {gpus} | {mark} | {prefill} | {gain} | {token} | {ratio} | {sent or '–'} | {peak} |")
    return "\n".join(lines)
