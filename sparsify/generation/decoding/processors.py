"""transformers' logits processors in a form that a CUDA graph can hold: functions of the scores and of buffers that stay where they are.

A processor is told the sequences so far, whose length changes with every token, and may read from the device; neither can be recorded.
Those of transformers that depend on the scores alone are recorded as they are. Those that look at the length or at which tokens occurred
are written here over a `State`, with the same arithmetic. Others, those of users too, cannot be recorded and run after the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import logits_process as stock


class State(Protocol):
    """What processors see of a generation.

    length: int64 [1], tokens of each row so far.
    seen: bool [rows, vocabulary + 1], the tokens that occurred in each row, for the repetition penalty; the last column stands for all
        tokens outside of the vocabulary. None where nothing needs it.
    """

    length: Tensor
    seen: Tensor | None

    def mask(self, tokens: tuple[int, ...], scores: Tensor) -> Tensor:
        """True for the given tokens, bool [vocabulary], on the device of scores."""
        ...


class Part(Protocol):
    """One processor. Parts that are equal do the same, so that a graph can be found by its parts."""

    def __call__(self, scores: Tensor, state: State) -> Tensor:
        """Changed scores, fp32 [rows, vocabulary], from scores of that form, which are not changed in place."""
        ...


@dataclass(frozen=True)
class ScoresOnly:
    """A processor of transformers that depends on nothing but the scores and its own numbers."""

    kind: type
    numbers: tuple[tuple[str, Any], ...]
    processor: Any = field(compare=False)

    def __call__(self, scores: Tensor, state: State) -> Tensor:
        return self.processor(None, scores)


@dataclass(frozen=True)
class Forbidden:
    """Tokens that get no probability: while a row is shorter than `below`, or where it has exactly `at` tokens; else always."""

    tokens: tuple[int, ...]
    below: int | None = None
    at: int | None = None

    def __call__(self, scores: Tensor, state: State) -> Tensor:
        mask = state.mask(self.tokens, scores)
        if self.below is not None:
            mask = mask & (state.length < self.below)
        if self.at is not None:
            mask = mask & (state.length == self.at)
        return torch.where(mask, -torch.inf, scores)


@dataclass(frozen=True)
class Forced:
    """The only tokens that are possible where a row has exactly `at` tokens."""

    tokens: tuple[int, ...]
    at: int

    def __call__(self, scores: Tensor, state: State) -> Tensor:
        forced = torch.where(state.mask(self.tokens, scores), 0.0, -torch.inf)
        return torch.where(state.length == self.at, forced, scores)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Scores of tokens that occurred are divided by the penalty, negative ones multiplied (arXiv 1909.05858, section 4.1)."""

    penalty: float

    def __call__(self, scores: Tensor, state: State) -> Tensor:
        if state.seen is None:
            raise ValueError("a repetition penalty needs to know which tokens occurred")
        lowered = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(state.seen[:, :-1], lowered, scores)


_SCORES_ONLY = {
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper,
    stock.EpsilonLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
}


def recordable(processors: Sequence[Any], prompt_len: int) -> tuple[Part, ...] | None:
    """The processors as parts for the tokens after the first new one, or None where one of them cannot be recorded.

    Reads lists of tokens from the device, which waits for it.

    Args:
        processors: of transformers, in the order in which they are applied.
        prompt_len: tokens of each row before the first new one.
    """
    parts: list[Part] = []
    for processor in processors:
        found = _part(processor, prompt_len)
        if found is None:
            return None
        parts.extend(found)
    if sum(isinstance(part, RepetitionPenalty) for part in parts) > 1:  # they may ignore different parts of the prompt
        return None
    return tuple(parts)


def _part(processor: Any, prompt_len: int) -> list[Part] | None:
    kind = type(processor)  # a subclass may do anything
    if kind in _SCORES_ONLY:
        numbers = tuple(sorted(vars(processor).items()))
        return [ScoresOnly(kind, numbers, processor)] if all(isinstance(value, int | float | None) for _, value in numbers) else None
    if kind is stock.MinLengthLogitsProcessor:
        return [Forbidden(_tokens(processor.eos_token_id), below=processor.min_length)]
    if kind is stock.MinNewTokensLengthLogitsProcessor:
        return [Forbidden(_tokens(processor.eos_token_id), below=processor.prompt_length_to_skip + processor.min_new_tokens)]
    if kind is stock.SuppressTokensLogitsProcessor:
        return [Forbidden(_tokens(processor.suppress_tokens))]
    if kind is stock.SuppressTokensAtBeginLogitsProcessor:
        return [Forbidden(_tokens(processor.begin_suppress_tokens), at=processor.begin_index)]
    if kind is stock.ForcedEOSTokenLogitsProcessor:
        return [Forced(_tokens(processor.eos_token_id), at=processor.max_length - 1)]
    if kind is stock.ForcedBOSTokenLogitsProcessor:
        return []  # it acts where a row has one token; then the token that follows is the first new one
    if kind is stock.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        largest = int(ignored.max()) if isinstance(ignored, Tensor) else ignored or 0
        return None if largest > prompt_len else [RepetitionPenalty(processor.penalty)]
    return None


def penalised(parts: Sequence[Part] | None, processors: Sequence[Any], ids: Tensor, vocabulary: int) -> Tensor | None:
    """`State.seen` after a prompt; None where no part needs it.

    Args:
        processors: those that the parts were made from.
        ids: int64 [rows, prompt_len].
        vocabulary: number of tokens.
    """
    if not any(isinstance(part, RepetitionPenalty) for part in parts or ()):
        return None
    ignored = next(p for p in processors if type(p) is stock.RepetitionPenaltyLogitsProcessor).prompt_ignore_length
    if isinstance(ignored, int):
        ids = ids[:, ignored:]
    elif ignored is not None:
        columns = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill(columns < ignored.to(ids.device)[:, None], vocabulary)
    return torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids.clamp(max=vocabulary), True)


def _tokens(tokens: Tensor | Sequence[int] | int) -> tuple[int, ...]:
    return tuple(tokens.flatten().tolist()) if isinstance(tokens, Tensor) else tuple([tokens] if isinstance(tokens, int) else tokens)
