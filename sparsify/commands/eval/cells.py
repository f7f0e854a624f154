"""What was measured: scores of one setting on one task at one length, and how they compare with dense attention's on the same questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.commands.eval import intervals
from sparsify.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting on one task at one length.

    setting, task: names. length: of the prompts in tokens; None where the task says nothing of it.
    metric: what a score is, such as "score" (0 to 1), "exact_match" or "nll" (nats a token).
    higher_is_better: of scores; False for "nll".
    scores: one a question, in the task's order. questions: a name for each, by which settings are paired.
    depths: where in its prompt what is asked for stands, 0 to 1; empty where that is no one place.
    density: mean visited share of the causal blocks over all block selections; None where none was made: attention was dense.
    density_by_layer: the same by layer, where every layer selected as often as the others.
    seconds: for all questions, compilation included.
    error: why there are no scores.
    """

    setting: str
    task: str
    length: int | None = None
    metric: str = "score"
    higher_is_better: bool = True
    scores: tuple[float, ...] = ()
    questions: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()
    density: float | None = None
    density_by_layer: tuple[float, ...] | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def bounded(self) -> bool:
        """Whether scores are shares."""
        return all(0 <= score <= 1 for score in self.scores) and self.metric != "nll"

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        return (
            intervals.wilson(min(sum(self.scores), len(self.scores)), len(self.scores))
            if self.bounded
            else intervals.bootstrap(self.scores)
        )

    @property
    def place(self) -> tuple[str, str, int | None]:
        return self.task, self.metric, self.length

    def data(self) -> dict[str, Any]:
        """As JSON takes it, with mean and interval."""
        found = asdict(self)
        return found | ({"mean": self.mean, "interval": list(self.interval)} if self.scores else {})


@dataclass(frozen=True)
class Difference:
    """A cell against dense attention's cell of the same task and length, question by question.

    mean: difference of the means, positive where the setting is better. interval: 95 % of it.
    lost, gained: questions that the setting answers worse and better.
    """

    cell: Cell
    dense: Cell
    mean: float
    interval: tuple[float, float]
    lost: int
    gained: int

    @property
    def sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.interval[0] <= 0 <= self.interval[1]

    def data(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": list(self.interval), "lost": self.lost, "gained": self.gained}


def compare(cell: Cell, dense: Cell) -> Difference:
    """Raises UnsupportedError where the two did not answer the same questions."""
    if cell.place != dense.place or cell.questions != dense.questions:
        raise UnsupportedError("other questions than dense attention was asked", where=f"{cell.setting}, {cell.task}")
    sign = 1 if cell.higher_is_better else -1
    steps = [sign * (a - b) for a, b in zip(cell.scores, dense.scores, strict=True)]
    up, down = sum(s for s in steps if s > 0), -sum(s for s in steps if s < 0)
    bounded = cell.bounded and dense.bounded
    interval = intervals.paired(up, down, len(steps)) if bounded else intervals.bootstrap(steps)
    return Difference(cell, dense, sum(steps) / len(steps), interval, sum(s < 0 for s in steps), sum(s > 0 for s in steps))


def differences(cells: Iterable[Cell], baseline: str) -> list[Difference]:
    """Every cell that has scores against the baseline's at the same place, where that has some."""
    cells = [cell for cell in cells if cell.scores]
    dense = {cell.place: cell for cell in cells if cell.setting == baseline}
    return [compare(cell, dense[cell.place]) for cell in cells if cell.setting != baseline and cell.place in dense]


def worst(found: Iterable[Difference]) -> dict[str, Difference]:
    """For each setting the task and length that loses most; of equal ones that with the lowest interval. NLL counts as none."""
    answers = [one for one in found if one.cell.metric != "nll"]
    by_setting: dict[str, Difference] = {}
    for one in answers:
        before = by_setting.get(one.cell.setting)
        if before is None or (one.mean, one.interval[0]) < (before.mean, before.interval[0]):
            by_setting[one.cell.setting] = one
    return by_setting
