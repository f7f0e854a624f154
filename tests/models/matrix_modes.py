"""The ways of running a model that the family matrix goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from tests.support.harness import holding, visible_error
from tests.support.tiny_models import VOCAB


@dataclass(frozen=True)
class Mode:
    """call(model, length) runs a prompt of about `length` tokens and returns logits, or generate()'s output where `generates`.

    graphs: the most that torch may compile for it. padding: the side of its rows' padding. title: the column in the documentation.
    """

    title: str
    call: Callable[[torch.nn.Module, int], Any]
    graphs: int
    generates: bool = False
    padding: str = ""

    def error(self, got: Any, want: Any, length: int) -> float:
        """Largest relative difference of logits on rows that are not padding."""
        if self.generates:
            return visible_error(torch.stack(got.logits), torch.stack(want.logits))
        return visible_error(got, want, padded(length, self.padding)["attention_mask"] if self.padding else None)


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(length: int, side: str) -> dict[str, torch.Tensor]:
    """Two rows, the first with 7 tokens less than the second."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(length - 7, length)] = 0
    return {"input_ids": prompt(2, length) * mask, "attention_mask": mask}


def prefill(model, length):
    return model(input_ids=prompt(2, length), use_cache=False).logits


def left(model, length):
    return model(**padded(length, "left"), use_cache=False).logits


def right(model, length):
    return model(**padded(length, "right"), use_cache=False).logits


def packed(model, length):
    first = length // 3
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    return model(input_ids=prompt(1, length), position_ids=positions, use_cache=False).logits


def pieces(model, tokens, cache, sizes, mask=None):
    """Logits of one call after another over slices of `tokens` of these sizes."""
    results, start = [], 0
    for size in sizes:
        seen = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        results.append(model(input_ids=tokens[:, start : start + size], **holding(cache), **seen).logits)
        start += size
    return torch.cat(results, 1)


def chunks(model, length):
    first = length * 3 // 5
    return pieces(model, prompt(2, length), DynamicCache(config=model.config), (first, length - first - 1, 1))


def static(model, length):
    first = length * 3 // 5
    return pieces(model, prompt(2, length), StaticCache(config=model.config, max_cache_len=length + 14), (first, length - first - 1, 1))


def whole(model, length):
    """A padded prompt, another chunk and a token: what most users' programs consist of."""
    inputs = padded(length, "left")
    first = length * 3 // 5
    return pieces(model, inputs["input_ids"], DynamicCache(config=model.config), (first, length - first - 1, 1), inputs["attention_mask"])


def generate(model, length, new=5, **more):
    return model.generate(
        **{"input_ids": prompt(1, length), **more},
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )


def generate_padded(model, length):
    return generate(model, length, **padded(length, "left"))


def generate_static(model, length):
    return generate(model, length, cache_implementation="static")


def second_turn(model, length):
    cache = DynamicCache(config=model.config)
    first = generate(model, length, **holding(cache))
    return generate(model, length, input_ids=torch.cat([first.sequences, prompt(1, 6, seed=1)], 1), **holding(cache))


def beam(model, length):
    return generate(model, length, num_beams=2)


MODES = {
    "prefill": Mode("prefill", prefill, 1),
    "chunks": Mode("chunked prefill", chunks, 3),
    "left": Mode("left-padded", left, 1, padding="left"),
    "right": Mode("right-padded", right, 1, padding="right"),
    "packed": Mode("packed", packed, 1),
    "whole": Mode("padded prompt, chunk, token", whole, 3, padding="left"),
    "static": Mode("own calls, StaticCache", static, 3),
    "generate": Mode("generate", generate, 3, generates=True),
    "generate_padded": Mode("generate, left-padded", generate_padded, 3, generates=True),
    "generate_static": Mode("generate, StaticCache", generate_static, 3, generates=True),
    "second_turn": Mode("second turn", second_turn, 4, generates=True),
    "beam": Mode("beam search", beam, 3, generates=True),
}
