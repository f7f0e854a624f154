"""What is asked of a model: prompts cut from a text, and what follows each.

A prompt ends in two ways. It goes on as the text does, or it repeats a passage that stood in it, which the model has to find again to go
on: few tokens of an ordinary text need what stands far away, and a choice that loses facts would look harmless on those alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.commands.calibrate.attention.run import offsets
from sparsify.errors import UnsupportedError

KINDS = ("continued", "recalled")
_MIDDLE = (0.05, 0.85)  # of a prompt: where a passage that is repeated begins


@dataclass(frozen=True)
class Piece:
    """A prompt and its continuation.

    kind: of `KINDS`.
    prompt: int64 [1, tokens]. answer: int64 [1, answer_tokens].
    """

    kind: str
    prompt: Tensor
    answer: Tensor


def cut(ids: Tensor, length: int, count: int, *, cue: int, answer: int, seed: int) -> list[Piece]:
    """Prompts of `length` tokens, as many of each kind.

    Args:
        ids: int64 [1, tokens], the text.
        count: pieces of the text, at most; each gives one prompt of each kind.
        cue: tokens at the end of a prompt that repeat a passage of it.
        answer: tokens after each prompt.
        seed: chooses pieces and passages.

    Raises:
        UnsupportedError: the text is shorter than a prompt with its answer, or the prompt than cue and answer need.
    """
    tokens = ids.shape[1]
    if tokens < length + answer:
        what = f"the text has {tokens} tokens, fewer than a prompt of {length} and {answer} after it"
        raise UnsupportedError(what, where="--text", hint="a longer text, or a smaller --length")
    first, last = (int(share * length) for share in _MIDDLE)
    if first + cue + answer > last:
        raise UnsupportedError(f"{length} tokens are too few for a cue of {cue} and an answer of {answer}", where="--length")
    draw = torch.Generator().manual_seed(seed)
    pieces = []
    for at in offsets(tokens, length + answer, count, seed):
        text = ids[:, at : at + length + answer]
        pieces.append(Piece(KINDS[0], text[:, :length], text[:, length:]))
        begin = int(torch.randint(first, last - cue - answer + 1, (1,), generator=draw))
        passage = text[:, begin : begin + cue + answer]
        pieces.append(Piece(KINDS[1], torch.cat((text[:, : length - cue], passage[:, :cue]), 1), passage[:, cue:]))
    return pieces
