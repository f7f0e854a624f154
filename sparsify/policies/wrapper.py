"""What policies share that change how another policy's choice is carried out."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import model_validator
from torch import Tensor

from sparsify import policies
from sparsify.errors import ConfigError
from sparsify.policies.base import Candidates, Policy


class Wrapper(Policy):
    """Base of such policies.

    of: name of the policy that scores tokens.
    options: its options.
    """

    of: str
    options: dict[str, Any]

    @model_validator(mode="after")
    def _scores(self) -> Wrapper:
        if self.of in ("full", "streaming_llm"):
            raise ValueError(f"{self.of} scores no tokens")
        try:
            inner = self.inner
        except ConfigError as error:  # pydantic reports ValueErrors alone
            raise ValueError(str(error)) from error
        if isinstance(inner, type(self)):
            raise ValueError(f"{self.of} within itself scores no tokens")
        return self

    @functools.cached_property
    def inner(self) -> Policy:
        return policies.make(self.of, **self.options)

    @property
    def observed(self) -> int:
        return self.inner.observed

    @property
    def carries(self) -> bool:
        return self.inner.carries

    def carry(self, candidates: Candidates, scores: Tensor) -> Tensor | None:
        return self.inner.carry(candidates, self.inner.score(candidates))

    @property
    def awaits(self) -> bool:
        return self.inner.awaits

    @property
    def scores_once(self) -> bool:
        return self.inner.scores_once

    @property
    def turns_back(self) -> bool:
        return self.inner.turns_back

    @property
    def decay(self) -> float:
        return self.inner.decay
