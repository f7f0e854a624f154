"""Needles for models whose tokens are bytes: all questions in one prompt, and one a turn."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsify.commands.eval import needles
from sparsify.commands.eval.cells import Cell
from sparsify.commands.eval.run import Run

FACTS, ASKS, TURNS = 32, 16, 8  # a prompt at most: facts, questions at its end, questions in turns
_BYTES = 128  # a fact, at least, so that some text is left


@dataclass(frozen=True)
class Needles:
    """Questions of one form at the end of prompts, answered within one call. Settings with a cache are asked by turns instead.

    length: of a prompt in bytes. samples: questions, rounded up to whole prompts. seed: of the first prompt.
    """

    form: str
    length: int
    text: bytes
    samples: int
    seed: int = needles.FIRST_SEED
    turns: bool = False

    @property
    def name(self) -> str:
        return f"needles_{self.form}" + ("_turns" if self.turns else "")

    @property
    def asks(self) -> int:
        return min(TURNS if self.turns else ASKS, self.samples, self.facts)

    @property
    def facts(self) -> int:
        return max(1, min(FACTS, self.length // _BYTES))

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + -(-self.samples // self.asks))

    def __len__(self) -> int:
        return len(self.seeds) * self.asks

    def ask(self, run: Run) -> list[Cell]:
        if run.setting.cache is not None and not self.turns:
            run.answered(len(self))
            return []
        answers: dict[str, list[tuple[bool, str, float]]] = defaultdict(list)
        with run.measuring() as measured:
            for seed in self.seeds:
                item = needles.prompt(self.length, self.text, seed, self.facts, self.asks, self.form)
                for turn, right in enumerate(self._answers(run, item)):
                    answers[self._row(turn)].append((right, f"{seed}:{turn}", item.depths[turn]))
                run.answered(self.asks)
        found = []
        for row, answered in answers.items():
            right, questions, depths = zip(*answered, strict=True)
            scores = tuple(map(float, right))
            cell = Cell(setting=run.setting.name, task=row, length=self.length, scores=scores, questions=questions, depths=depths)
            found.append(replace(cell, **measured.data()))
        return found

    def _row(self, turn: int) -> str:
        return self.name if not self.turns else f"{self.name}, {'first' if turn == 0 else 'later'}"

    def _answers(self, run: Run, item: needles.Prompt) -> Any:
        ids = item.ids.to(run.device)
        if not self.turns:
            return needles.right_answers(run.model(ids, use_cache=False).logits, item)
        from sparsify.generation.compat import with_cache

        wanted = run.setting.cache
        cache = run.cache(self.length) or run.full_cache(self.length)

        def feed(some: torch.Tensor) -> torch.Tensor:
            keep = 1 if some.shape[1] > self.length // 2 else some.shape[1]  # of the context only the last row is read
            return run.model(some, **with_cache(run.model, cache), use_cache=True, logits_to_keep=keep).logits

        return list(needles.right_by_turn(feed, item, wanted is None or wanted.question == "inside"))
