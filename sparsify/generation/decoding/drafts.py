"""Self-speculation: tokens drafted over some pages of an exact cache, then computed at once over all of it.

A draft is kept up to the first token that the exact model would not have chosen, and that model's own choice follows it: greedy tokens are
those of decoding without drafts. Sampled tokens are accepted or drawn anew so that their distribution is the exact model's (speculative
sampling, arXiv 2211.17192, algorithm 1). Rows side by side keep as many drafts as the row that keeps fewest: what another row would have
kept beyond that is forgotten before anything depends on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.generation.caches.drafting import MOST
from sparsify.generation.decoding.draft_lengths import DraftLength, Seconds
from sparsify.generation.decoding.processors import Part
from sparsify.generation.decoding.runner import Runner
from sparsify.generation.decoding.step import Step, drawn
from sparsify.generation.decoding.step_caches import SparseStep, StepCache


def refusal(cache: Any, parts: tuple[Part, ...] | None) -> str:
    """Why a generation over a cache that drafts goes on without, in a clause; empty where nothing speaks against it.

    Args:
        cache: the SparseCache.
        parts: the logits processors in the form that a step records; None where they cannot be recorded.
    """
    if parts is None:
        return "a logits processor looks at the tokens so far"
    if any(layer.left_out for layer in cache.layers):
        return "some layers were given some of the prompt's tokens"
    if any(layer.shard is not None for layer in cache.layers):
        return "the text is divided among processes"
    return ""


class _At:
    """What processors see at one place of a draft: `processors.State`."""

    def __init__(self, step: Step, length: Tensor, seen: Tensor | None):
        self.step, self.length, self.seen = step, length, seen

    def mask(self, tokens: tuple[int, ...], scores: Tensor) -> Tensor:
        return self.step.mask(tokens, scores)


class Drafts:
    """Draft steps and verifications over the buffers of a Step, each a function without arguments that a CUDA graph can hold.

    Args:
        step: of the generation; `sample`, `parts`, `running` and its last token are read.
        forward: takes `input_ids` [rows, tokens] and `position_ids`, stores the tokens in the cache; returns logits [rows, tokens,
            vocabulary].
        cache: a SparseStep.
        make_runner: makes what runs such a function.
        seconds: that drafts and verifications are expected to take.

    Buffers:
        drafted     int64 [rows, MOST]        the tokens of a draft
        shares      fp32 [rows, MOST, vocabulary] or None: where tokens are sampled, the distributions that they were drawn from
        at          int64 [1]                 tokens of the draft so far
        token, position, length, seen         of the draft, as the Step's
        found       int64 [rows, MOST + 1]    after a verification: the tokens that follow
        count       int64 []                  how many of the draft were kept; one more follows
        logits, scores  fp32 [rows, drafted + 1, vocabulary] of the last verification, before and after the processors
    """

    def __init__(
        self,
        step: Step,
        forward: Callable[..., Tensor],
        cache: StepCache,
        make_runner: Callable[[Callable[[], None]], Runner],
        seconds: Seconds,
    ):
        if not isinstance(cache, SparseStep):
            raise TypeError(f"a {type(cache).__name__} drafts nothing")
        self.step, self.forward, self.cache, self.make_runner = step, forward, cache, make_runner
        rows, zeros = step.token.shape[0], step.token.new_zeros
        self.drafted, self.found = zeros(rows, MOST), zeros(rows, MOST + 1)
        self.at, self.count = zeros(1), zeros(())
        self.token, self.position, self.length = (torch.zeros_like(t) for t in (step.token, step.position, step.length))
        self.seen: Tensor | None = None
        self.shares: Tensor | None = None
        self.logits = self.scores = torch.empty(0)
        # of the verifications of each length: a graph that is replayed writes to its own tensors and runs no Python
        self._results: dict[int, tuple[Tensor, Tensor]] = {}
        self.seconds = seconds
        self._drafting = make_runner(self._draft_one)
        self._verifying: dict[int, Runner] = {}

    def lengths(self) -> DraftLength:
        """How many tokens a generation drafts each time."""
        return DraftLength(self.seconds, self.cache.cache.draft_tokens)

    def forget(self) -> None:
        """The cache's buffers have moved."""
        for runner in (self._drafting, *self._verifying.values()):
            runner.forget()

    def take_back(self, tokens: int) -> None:
        """Takes the last tokens of every row out of the cache."""
        self.cache.cache.take_back(torch.full_like(self.count, tokens), tokens)

    def round(self, drafts: int, stored: int, vocabulary: int) -> int:
        """Drafts so many tokens after the Step's last one and verifies them.

        Args:
            stored: columns that the cache holds; afterwards it holds as many more as tokens were found.
            vocabulary: number of tokens.

        Returns:
            how many tokens follow: 1 to drafts + 1, in `found`. Waits for the device.
        """
        cache = self.cache.cache
        self._begin(vocabulary)
        with cache.call.changing():  # until it is over the cache holds tokens that nobody has chosen
            for done in range(drafts):
                cache.recount(stored + done)
                self._drafting()
            if drafts not in self._verifying:
                self._verifying[drafts] = self.make_runner(functools.partial(self._verify, drafts))
            cache.recount(stored)
            self._verifying[drafts]()
            self.logits, self.scores = self._results[drafts]
            kept = int(self.count)
        cache.recount(stored + kept + 1)
        cache.draft_rounds += 1
        cache.drafted += drafts
        cache.drafts_kept += kept
        return kept + 1

    def _begin(self, vocabulary: int) -> None:
        step = self.step
        for own, theirs in ((self.token, step.token), (self.position, step.position), (self.length, step.length)):
            own.copy_(theirs)
        self.at.zero_()
        if step.seen is not None:
            self.seen = step.seen.clone() if self.seen is None else self.seen.copy_(step.seen)
        if step.sample and (self.shares is None or self.shares.shape[-1] != vocabulary):
            self.shares = torch.zeros(*self.drafted.shape, vocabulary, dtype=torch.float32, device=self.drafted.device)

    def _processed(self, logits: Tensor, length: Tensor, seen: Tensor | None) -> Tensor:
        """Scores after the processors, of fp32 logits [rows, vocabulary] where a row has `length` tokens."""
        state = _At(self.step, length, seen)
        for part in self.step.parts or ():
            logits = part(logits, state)
        return logits

    def _draft_one(self) -> None:
        """One token more in the draft."""
        with self.cache.cache.drafting():
            logits = self.forward(input_ids=self.token, position_ids=self.position)[:, -1].to(torch.float32)
        scores = self._processed(logits, self.length, self.seen)
        if self.shares is None:
            token = scores.argmax(-1)
        else:
            shares = torch.nn.functional.softmax(scores, dim=-1)
            self.shares.index_copy_(1, self.at, shares[:, None])
            token = drawn(shares)
        self.drafted.index_copy_(1, self.at, token[:, None])
        self.token.copy_(token[:, None])
        for count in (self.position, self.length, self.at):
            count.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)

    def _verify(self, drafts: int) -> None:
        """Takes the draft back, computes its tokens over everything, and keeps those that are right."""
        step, cache = self.step, self.cache.cache
        drafted = self.drafted[:, :drafts]
        cache.take_back(torch.full_like(self.count, drafts), drafts)
        positions = step.position + torch.arange(drafts + 1, device=step.position.device)
        logits = self.forward(input_ids=torch.cat((step.token, drafted), 1), position_ids=positions)
        logits = logits.to(copy=True, dtype=torch.float32)
        scores = torch.stack([self._scores_at(place, drafted, logits) for place in range(drafts + 1)], 1)
        self._results[drafts] = logits, scores
        chosen, right = self._judged(drafted, scores)
        # rows that have ended keep any draft
        right = right | (step.running == 0)[:, None]
        kept = right.long().cumprod(1).sum(1).min()
        self.count.copy_(kept)
        if step.sample:
            chosen = self._corrected(drafted, scores, right, kept)
        self.found[:, : drafts + 1] = chosen
        cache.take_back(drafts - kept, drafts)

    def _scores_at(self, place: int, drafted: Tensor, logits: Tensor) -> Tensor:
        """Scores [rows, vocabulary] after `place` tokens of the draft."""
        seen = self.step.seen
        if seen is not None and place:
            seen = seen.scatter(1, drafted[:, :place], True)
        return self._processed(logits[:, place], self.step.length + place, seen)

    def _judged(self, drafted: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The exact model's most likely tokens [rows, drafts + 1], and which drafts it takes, bool [rows, drafts]."""
        most_likely = scores.argmax(-1)
        if self.shares is None:
            return most_likely, most_likely[:, :-1] == drafted
        exact = self.step.probabilities(scores)[:, :-1].gather(2, drafted[..., None])[..., 0]
        draft = self.shares[:, : drafted.shape[1]].gather(2, drafted[..., None])[..., 0]
        return most_likely, torch.rand_like(exact) * draft < exact

    def _corrected(self, drafted: Tensor, scores: Tensor, right: Tensor, kept: Tensor) -> Tensor:
        """The draft with what follows it at place `kept`: another row's number of drafts may end one that was right, [rows, drafts + 1].
        Where it was not, a token is drawn from what the exact distribution has more than the draft's; behind a whole draft from the exact
        one."""
        if self.shares is None:
            raise RuntimeError("no distributions were kept")
        rows, drafts = drafted.shape
        at = kept.expand(rows, 1)
        exact = torch.nn.functional.softmax(scores, dim=-1).take_along_dim(at[..., None], 1)[:, 0]
        draft = torch.cat((self.shares[:, :drafts], torch.zeros_like(self.shares[:, :1])), 1).take_along_dim(at[..., None], 1)[:, 0]
        more = (exact - draft).clamp(min=0)
        # of two equal distributions nothing is left, but for rounding
        fresh = drawn(torch.where(more.sum(-1, keepdim=True) > 0, more, exact))
        ended = torch.nn.functional.pad(drafted, (0, 1))
        was_right = torch.nn.functional.pad(right, (0, 1)).gather(1, at)
        return ended.scatter(1, at, torch.where(was_right, ended.gather(1, at), fresh[:, None]))
