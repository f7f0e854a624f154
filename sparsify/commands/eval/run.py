"""One setting's model while it is asked: compiled, its caches, and how dense it turned out to be."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparsify import api
from sparsify.commands.eval.cells import Cell
from sparsify.commands.eval.settings import Setting, merged
from sparsify.errors import UnsupportedError
from sparsify.planning import registry


@dataclass
class Measured:
    """What a block of calls took and visited, filled when it ends; see Cell."""

    density: float | None = None
    density_by_layer: tuple[float, ...] | None = None
    seconds: float = 0.0

    def data(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Run:
    """A model under one setting.

    batch: questions asked at once, where a task can.
    answered: called with the number of questions that are done.
    """

    model: Any
    setting: Setting
    batch: int = 1
    answered: Callable[[int], None] = lambda count: None
    _caches: dict[tuple[int, int], Any] = field(default_factory=dict)
    _listing: Counter[int | None] = field(default_factory=Counter)  # graphs so far in which a layer's attention goes by block lists

    @property
    def device(self) -> torch.device:
        return self.model.device

    def cache(self, length: int, rows: int = 1) -> Any:
        """The setting's cache, empty, for prompts of `length` tokens; None where it has none. The one before must be done with: of equal
        sizes they are the same object, so that CUDA graphs are recorded once."""
        from sparsify.generation.caches.sparse_cache import SparseCache

        wanted = self.setting.cache
        if wanted is None:
            return None
        key = wanted.tokens(length), rows
        if key in self._caches:
            self._caches[key].reset()
        else:
            self._caches.clear()
            self._caches[key] = SparseCache(self.model.config, wanted.policy, key[0], **dict(wanted.options))
        return self._caches[key]

    def full_cache(self, tokens: int) -> Any:
        """A cache that keeps everything, with room for `tokens`."""
        from transformers import DynamicCache

        from sparsify.generation.caches.sparse_cache import SparseCache

        try:
            return SparseCache(self.model.config, "full", tokens)
        except UnsupportedError:
            return DynamicCache(config=self.model.config)

    @contextmanager
    def measuring(self) -> Generator[Measured]:
        found, started = Measured(), time.monotonic()
        with api.record_density() as densities, api.collect_plans() as plans:
            yield found
        found.seconds = time.monotonic() - started
        methods = registry.discover()
        decided = [one for plan in plans for one in plan.decisions if one.kind == "attention" and one.method is not None]
        self._listing.update(one.layer for one in decided if methods[one.method or ""].lists_blocks)
        if densities:
            found.density = sum(densities) / len(densities)
            layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
            # of layers some of which select, as beside sliding windows, which selection is whose cannot be told
            alike = len({self._listing[layer] for layer in range(layers)}) == 1
            if alike and len(densities) % layers == 0:
                calls = len(densities) // layers
                found.density_by_layer = tuple(sum(densities[layer::layers]) / calls for layer in range(layers))


class Task(Protocol):
    """Questions of one kind at one length, the same for every setting."""

    name: str
    length: int | None

    def __len__(self) -> int:
        """How many questions."""
        ...

    def ask(self, run: Run) -> list[Cell]: ...


def prepare(model: Any, setting: Setting, common: Mapping[str, Any]) -> None:
    """Compiles the model for a setting. Code compiled for the setting before is dropped, so that settings share no limit of recompiling."""
    torch._dynamo.reset()
    if setting.options is not None:
        api.compile(model, **merged(common, setting))


def ask(run: Run, task: Task, debug: bool = False) -> list[Cell]:
    """The task's cells; where it fails, one that says why. debug: raise instead."""
    try:
        with torch.no_grad():
            return task.ask(run)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return [Cell(setting=run.setting.name, task=task.name, length=task.length, error=reason[:300])]
