"""How caches are made that keep a share of a text, and what a model answers over them: all questions of one text are rows of a batch.

The text is read once, as one row in one call. Then what a policy has left of it (or all of it) is given to as many rows as there are
questions, each of which asks one:

    end          the question is read, then the policy chooses, then the answer is given
    blind        the policy chooses, then the question is read
    second turn  behind the answer of `end` follows another question

A policy chooses at the end of the call that brings more than its cache has room for beside the budget: that of the text, or that of the
question. Afterwards there is room for what follows, so that no byte of an answer takes a kept one's place. Answers are teacher-forced in
one call where a call of several tokens reads what its tokens one by one would read; where single tokens choose what they read (`read=`) in
one call each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.lib.needles import Prompt
from sparsify import Clusters, Pages, SparseCache
from sparsify.generation.compat import with_cache

QUESTION = len("\n?? abcdef: ")
ASKED = ("end", "blind", "second turn")
READ = ("pages", "clusters")  # keep everything
# tokens that come after the text: two questions and answers
_ROOM = 64
# the scores of bytes: a fact's bytes hang together over some 15 of them, and the question's own queries score
_BYTES = {"window": QUESTION, "kernel": 15}
# asked at the end, these are told to choose: layers with budgets of their own are not full at once, and queries of the whole text count,
# of which as many are kept as there is room beside the budget
_TOLD = ("pyramidkv", "expected_attention")
# DuoAttention's numbers (arXiv 2410.10819, section 3)
_SINKS, _WINDOW = 16, 64


@dataclass(frozen=True)
class Setting:
    """A policy, or a way to read everything.

    policy: of `sparsify.policies`, or one of READ.
    options: of the policy.
    """

    policy: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def selects(self) -> bool:
        """Whether its caches have room beside the budget, and choose when it is full."""
        return self.policy not in ("full", "streaming_llm", *READ)

    @property
    def waits(self) -> bool:
        """Whether its policy chooses only when it is told to, since it has to be told the logits of a call first."""
        return self.policy == "sirllm"

    def cache(self, config: Any, length: int, budget: int, every: int, share: float) -> SparseCache:
        """An empty one.

        Args:
            length: bytes of the text, of which `full` has room for all.
            budget: bytes kept of it.
            every: bytes beside the budget.
            share: of the pages that a token reads, under READ.
        """
        if self.policy in READ:
            how = Pages(share=share) if self.policy == "pages" else Clusters(share=share)
            return SparseCache(config, "full", length + _ROOM, read=how)
        if self.policy == "full":
            return SparseCache(config, "full", length + _ROOM)
        return SparseCache(config, self.policy, budget, every=every if self.selects else None, **self.options)


def settings(heads: Path | None, streaming: tuple[tuple[int, ...], ...]) -> dict[str, Setting]:
    """All that are asked, by name.

    Args:
        heads: trained heads of locret; None: without it.
        streaming: KV heads that stream, by layer, as `streaming_heads` finds them.
    """
    duo = {"streaming": streaming, "sinks": _SINKS, "window": _WINDOW, "of": "snapkv", "options": _BYTES}
    of_snapkv = {"of": "snapkv", "options": _BYTES}
    found = {
        "full": Setting("full"),
        "pages": Setting("pages"),
        "clusters": Setting("clusters"),
        "snapkv": Setting("snapkv", _BYTES),
        "snapkv, smoothed over 5": Setting("snapkv", _BYTES | {"kernel": 5}),
        "adakv of snapkv": Setting("adakv", of_snapkv),
        "pyramidkv of snapkv": Setting("pyramidkv", of_snapkv),
        "chunkkv of snapkv": Setting("chunkkv", of_snapkv),
        "duo and snapkv": Setting("duo", duo),
        "h2o": Setting("h2o"),
        "tova": Setting("tova"),
        "expected_attention": Setting("expected_attention"),
        "keydiff": Setting("keydiff"),
        "knorm": Setting("knorm"),
        "sirllm": Setting("sirllm"),
        "streaming_llm": Setting("streaming_llm"),
    }
    if heads is not None:
        found["locret"] = Setting("locret", {"heads": str(heads), "recent": 16})
    return found


@dataclass(frozen=True)
class Found:
    """What was answered: logits by how it was asked, [questions, bytes of an answer, vocabulary], and the share of the text that was kept
    for them."""

    logits: dict[str, Tensor]
    kept: dict[str, float]


@torch.no_grad()
def ask(model: LlamaForCausalLM, item: Prompt, setting: Setting, share: float, together: bool | None = None) -> Found:
    """Answers to all questions of a prompt of one form, by a model of bytes over caches that keep or read a share of its text.

    Args:
        together: whether answers are given in one call; None: where that is the same.
    """
    ids, end = item.ids.to(model.device), item.questions[0]
    answers = torch.stack([ids[0, start : start + size] for start, size in item.answers])
    questions = torch.stack([ids[0, at:start] for at, (start, _) in zip(item.questions, item.answers, strict=True)])
    together = setting.policy not in READ if together is None else together
    newline = answers.new_full((len(answers), 1), ord("\n"))
    following = torch.cat((answers[:, -1:], newline, questions.roll(-1, 0)), 1), answers.roll(-1, 0)
    budget = max(int(end * share), 1)
    make = lambda every: setting.cache(model.config, end, budget, every, share)
    logits, kept = {}, {}
    if setting.policy not in READ:
        # the call of the text brings more than there is room for, after which the policy has chosen
        blind = make(end + _ROOM if setting.waits else _ROOM)
        _call(model, blind, ids[:, :end])
        if setting.waits:
            blind.end_turn()
        kept["blind"] = _kept(blind, end)
        blind.batch_repeat_interleave(len(questions))
        logits["blind"] = _answered(model, blind, questions, answers, together)
        del blind
    # here that of the question, by one byte
    told = setting.waits or setting.policy in _TOLD
    cache = make(end + _ROOM if told else end + QUESTION - 1 - budget)
    _call(model, cache, ids[:, :end])
    if isinstance(cache.read, Clusters):
        cache.prepare()
    cache.batch_repeat_interleave(len(questions))
    first = _call(model, cache, questions)[:, -1:]
    if told:
        cache.end_turn()
    kept["end"] = kept["second turn"] = _kept(cache, end + QUESTION)
    size = answers.shape[1]
    if together:
        rest = _call(model, cache, torch.cat((answers[:, :-1], *following), 1)[:, :-1])
    else:
        rest = torch.cat((_one_by_one(model, cache, answers[:, :-1]), _answered(model, cache, *following, together)), 1)
    logits["end"] = torch.cat((first, rest[:, : size - 1]), 1)
    logits["second turn"] = rest[:, -size:]
    if setting.policy in READ:  # nothing goes, so that nobody has to know what will be asked
        logits["blind"], kept["blind"] = logits["end"], kept["end"]
    return Found(logits, kept)


def right(found: Found, item: Prompt) -> dict[str, list[bool]]:
    """By how it was asked, whether each byte of the answer to each question is the likeliest; the second turn's questions are those of the
    next row."""
    answers = torch.stack([item.ids[0, start : start + size] for start, size in item.answers])
    guesses = {asked: logits.argmax(-1).cpu() for asked, logits in found.logits.items()}
    wanted = {asked: answers.roll(-1, 0) if asked == "second turn" else answers for asked in guesses}
    return {asked: (guess == wanted[asked]).all(1).tolist() for asked, guess in guesses.items()}


def _call(model: LlamaForCausalLM, cache: SparseCache, ids: Tensor) -> Tensor:
    """Logits of some more bytes of each row."""
    logits = model(ids, **with_cache(model, cache)).logits
    cache.observe(logits, ids)
    return logits


def _answered(model: LlamaForCausalLM, cache: SparseCache, questions: Tensor, answers: Tensor, together: bool) -> Tensor:
    """Logits of each byte of answers [rows, bytes] behind questions [rows, any]."""
    if together:
        return _call(model, cache, torch.cat((questions, answers[:, :-1]), 1))[:, -answers.shape[1] :]
    first = _call(model, cache, questions)[:, -1:]
    return torch.cat((first, _one_by_one(model, cache, answers[:, :-1])), 1)


def _one_by_one(model: LlamaForCausalLM, cache: SparseCache, ids: Tensor) -> Tensor:
    return torch.cat([_call(model, cache, ids[:, at : at + 1]) for at in range(ids.shape[1])], 1)


def _kept(cache: SparseCache, length: int) -> float:
    """Share of so many bytes that a head has kept on the mean of all layers."""
    layers = cache.layers
    return sum(layer.counts.float().clamp(max=_most(layer)).mean().item() for layer in layers) / len(layers) / length


def _most(layer: Any) -> float:
    """Counts of a layer whose tokens take each other's places go on beyond its slots."""
    return float(layer.keys.shape[2]) if layer.starts is None else float("inf")


@torch.no_grad()
def streaming_heads(load: Callable[[], LlamaForCausalLM], item: Prompt) -> tuple[tuple[int, ...], ...]:
    """The half of a model's KV heads whose queries look least beyond the first and the last bytes while a prompt's questions are asked and
    answered: those that DuoAttention has stream. It learns them; here weights of one prompt say it.

    Args:
        load: gives the model with eager attention.

    Returns:
        by layer their numbers.
    """
    model = load()
    weights = model(item.ids.to(model.device), output_attentions=True, use_cache=False).attentions
    first, count = item.questions[0], item.ids.shape[1]
    at = torch.arange(count, device=model.device)
    far = (at >= _SINKS) & (at <= at[first:, None] - _WINDOW)
    heads = model.config.num_key_value_heads
    beyond = torch.stack([(layer[0, :, first:].float() * far).sum(-1).mean(-1).view(heads, -1).amax(1) for layer in weights])
    order = beyond.flatten().argsort(stable=True)[: beyond.numel() // 2].tolist()
    return tuple(tuple(head for head in range(heads) if layer * heads + head in order) for layer in range(len(beyond)))
