"""Reads a prompt of any length piece by piece and carries on what a question needs of it, by the model's own attention.

InfiniRetri (arXiv 2502.12962) reads chunk after chunk, each behind the tokens that mattered so far, and keeps those that the question looks
at. So does this, by the layer and the heads of `token_select`: a chunk costs the layers up to that one, and nothing is stored but tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import UnsupportedError
from sparsify.generation import new_prompt

_WHERE = "sparsify.retrieve"


@dataclass(frozen=True)
class Retrieved:
    """What was carried to the end.

    ids: int64 [1, kept + question_len], the tokens of the prompt that were carried, in their order, and the question: a prompt for
        `generate()`.
    columns: int64 [kept], where in the long prompt they stand, rising.
    chunks: pieces that were read.
    """

    ids: Tensor
    columns: Tensor
    chunks: int


@torch.no_grad()
def retrieve(
    model: Any,
    prompt: Tensor,
    question: Tensor,
    *,
    chunk: int = 8192,
    overlap: int = 64,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Retrieved:
    """The tokens of a prompt that a question needs.

    The prompt may be longer than the model's positions: no call has more than `chunk` tokens. Memory is that of one such call up to the
    layer that chooses.

    Args:
        model: compiled by `sparsify.compile` with `token_select` in the mode "prompt". Its `keep`, tokens or a share of `chunk`, is what
            is carried, the question included; a question replaces `window`, and shortens `queries` to its length.
        prompt: int64 [1, tokens] or [tokens].
        question: int64 [1, question_len] or [question_len], read behind each piece.
        chunk: tokens of one call: what is carried, new ones, and the question.
        overlap: tokens that are read again with the next piece, so that what a border cuts is whole in one of both.
        progress: called with (tokens read, tokens) after each piece.

    Raises:
        UnsupportedError: the model does not choose, or a call of that size leaves no room for new tokens, or its layers cannot choose.
        ValueError: operands of another form.

    Source: InfiniRetri (arXiv 2502.12962), algorithm 1, over tokens instead of sentences.
    """
    prompt, question = (_row(name, ids, model.device) for name, ids in (("prompt", prompt), ("question", question)))
    chooser = new_prompt.asked(model)
    if chooser is None or chooser.method.keep is None:
        hint = (
            'sparsify.compile(model, passes=["token_select", "dense"], token_select={"mode": "prompt", "layer": …, "heads": …, "keep": …})'
        )
        raise UnsupportedError("the model was not compiled to choose tokens", where=_WHERE, hint=hint)
    asking, tokens = question.shape[0], prompt.shape[0]
    most = chooser.method.most(chunk) - asking
    fresh = chunk - asking - most
    if most <= chooser.method.sinks or fresh <= overlap:
        what = (
            f"a call of {chunk} tokens has {most} that are carried, {asking} of the question and {fresh} new ones, {overlap} of them again"
        )
        raise UnsupportedError(what, where=_WHERE, hint="a larger chunk, or another token_select.keep")
    method = chooser.method.model_copy(
        update={"keep": most + asking, "mass": None, "window": asking, "queries": min(chooser.method.queries, asking)}
    )
    carried = torch.empty(0, dtype=torch.int64, device=prompt.device)
    begin = pieces = 0
    while begin < tokens:
        end = min(tokens, begin + chunk - asking - carried.shape[0])
        columns = torch.cat((carried, torch.arange(begin, end, device=prompt.device)))
        pieces += 1
        if columns.shape[0] > most:
            chosen = new_prompt.choose(model, torch.cat((prompt[columns], question))[None], None, method)
            if chosen is None:
                raise UnsupportedError("its layers cannot choose tokens", where=_WHERE, hint="sparsify.explain says why")
            columns = columns[chosen[0, : -asking or None]]
        progress(end, tokens)
        begin = end if end == tokens else end - overlap
        carried = columns[columns < begin] if end < tokens else columns
    return Retrieved(torch.cat((prompt[carried], question))[None], carried, pieces)


def _row(name: str, ids: Tensor, device: torch.device) -> Tensor:
    row = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
    if row.dim() != 1 or row.is_floating_point() or not row.shape[0]:
        raise ValueError(f"{name}: expected tokens of one row, int64 [1, tokens], not {row.dtype} {list(ids.shape)}")
    return row.to(device)
