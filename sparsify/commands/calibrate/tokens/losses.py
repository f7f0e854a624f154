"""What a prompt's answer loses where only some of its tokens go on, by running it so."""

from __future__ import annotations

import contextlib
import inspect
import statistics
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import sparsify
from sparsify.commands.calibrate.tokens.pieces import KINDS, Piece
from sparsify.generation.compat import with_cache
from sparsify.generation.regions import regional
from sparsify.passes.token_select import TokenSelect


@dataclass(frozen=True)
class Loss:
    """Of one kind of prompts.

    nll: nats that an answer's token loses against dense, the mean. error: standard error of that, over prompts; 0 of one.
    agree: share of the answers' tokens that would be chosen greedily as dense does.
    """

    nll: float
    error: float
    agree: float


@dataclass(frozen=True)
class Answers:
    """By piece: fp32 [answer_tokens] negative log-likelihoods, int64 [answer_tokens] of the likeliest tokens."""

    nll: list[Tensor]
    likeliest: list[Tensor]


def options_with(method: TokenSelect | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `sparsify.compile` by which `method` acts too; of those that act without it, where it is None."""
    others = [name for name in options["passes"] if name != "token_select"]
    rest = {name: value for name, value in options.items() if name != "token_select"} | {"plan": None, "lower": "eager"}
    if method is None:
        return {**rest, "passes": others}
    return {**rest, "passes": ["token_select", *others], "token_select": method.options(), "strict": True}


@contextlib.contextmanager
def compiled(model: nn.Module, method: TokenSelect | None, options: Mapping[str, Any]) -> Generator[nn.Module]:
    """Within the block the model's calls are narrowed; without a method they are what they are compared with.

    Args:
        options: of `sparsify.compile`, with the methods that act beside.
    """
    sparsify.compile(model, **options_with(method, options))
    try:
        yield model
    finally:
        regional.remove(model)
        model._compiled_call_impl = None


@torch.no_grad()
def answers(model: Any, pieces: Iterable[Piece], progress: Callable[[], None] = lambda: None) -> Answers:
    """Reads each prompt into a cache, then its answer."""
    found = Answers([], [])
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for piece in pieces:
        cached = with_cache(model, DynamicCache(config=model.config)) | {"use_cache": True}
        ahead = model(input_ids=piece.prompt, **last, **cached).logits[:, -1:]
        rest = model(input_ids=piece.answer[:, :-1], **cached).logits
        logits = torch.cat((ahead, rest), 1)[0].float()
        found.nll.append(nn.functional.cross_entropy(logits, piece.answer[0], reduction="none").cpu())
        found.likeliest.append(logits.argmax(-1).cpu())
        progress()
    return found


def compare(pieces: Sequence[Piece], dense: Answers, other: Answers) -> dict[str, Loss]:
    """By kind of prompts."""
    losses: dict[str, Loss] = {}
    for kind in KINDS:
        at = [index for index, piece in enumerate(pieces) if piece.kind == kind]
        lost = [float((other.nll[i] - dense.nll[i]).mean()) for i in at]
        same = [float((other.likeliest[i] == dense.likeliest[i]).float().mean()) for i in at]
        error = statistics.stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
        losses[kind] = Loss(statistics.fmean(lost), error, statistics.fmean(same))
    return losses
