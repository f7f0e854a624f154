"""Reads the tokens that a layer chose anew, as a prompt of their own (GemFilter, arXiv 2409.17422, algorithm 1).

`generate()` runs the prompt up to the layer that chooses, and then itself over the chosen tokens: positions begin at 0 again, and every
layer's cache holds those tokens alone. What comes back is the caller's prompt and the new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.generation import compat
from sparsify.generation.regions import narrowing, regional
from sparsify.generation.regions.narrowed import Chosen
from sparsify.planning.method import Pass

# tensors beside the tokens that can follow them
_FOLLOW = ("attention_mask",)


def asked(model: Any) -> narrowing.Narrowing | None:
    """What chooses tokens that a compiled model's `generate()` reads anew; None where nothing does."""
    own = model._compiled_call_impl
    found = own.narrowing if isinstance(own, regional.RegionalModel) and not own.reason else None
    return found if found is not None and found.method.mode == "prompt" else None


def generate(chooser: narrowing.Narrowing, original: Callable[..., Any], model: Any, given: Mapping[str, Any]) -> Any:
    """`original(model, ...)` over the chosen tokens, or over all of them where they cannot be chosen.

    Args:
        given: arguments of `GenerationMixin.generate` by name, its further keyword arguments under "kwargs".

    Raises:
        UnsupportedError: they cannot be chosen, under `strict`.
    """
    call = {name: value for name, value in given.items() if name not in ("self", "kwargs")} | dict(given.get("kwargs", {}))
    ids: Any = call.get("inputs", call.get("input_ids"))
    reason = _trouble(model, ids, call)
    columns = None
    if reason:
        chooser.refuse(reason)
    else:
        columns = choose(model, ids, call.get("attention_mask"))
    with narrowing.reading("anew"):
        if columns is None:
            return original(model, **call)
        call.pop("inputs", None)
        call |= {"input_ids": ids.gather(1, columns), **_lengths(model, call, ids.shape[1])}
        if call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"].gather(1, columns)
        made = original(model, **call)
    rows = made.shape[0] // ids.shape[0]  # of each prompt
    return torch.cat((ids.repeat_interleave(rows, 0), made[:, columns.shape[1] :]), 1)


def choose(model: Any, ids: Tensor, mask: Tensor | None, method: Pass | None = None) -> Tensor | None:
    """The columns of a prompt that a layer of the compiled model chooses.

    Args:
        ids: int64 [batch, tokens]. mask: [batch, tokens], 0 for padding.
        method: chooses instead of the model's, by the same layer.

    Returns:
        int64 [batch, kept], rising; None where all go on.
    """
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        given["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    try:
        with torch.no_grad(), narrowing.reading("choosing", method):
            model(**given)
    except Chosen as chosen:
        return chosen.columns
    return None


def _trouble(model: Any, ids: Any, call: Mapping[str, Any]) -> str:
    """Why a call of `generate()` cannot read a prompt of other tokens; empty where it can."""
    config = call.get("generation_config") or model.generation_config
    setting = lambda name: call[name] if call.get(name) is not None else getattr(config, name, None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or call.get("inputs_embeds") is not None:
        return "the prompt is not one of tokens"
    if call.get(compat.CACHE_NAME) is not None or call.get("past_key_values") is not None:
        return "a cache is given, whose later turns would count the tokens that were left out"
    if setting("return_dict_in_generate"):
        return "a cache is asked for, whose later turns would count the tokens that were left out"
    if setting("min_length"):
        return "min_length counts the prompt (min_new_tokens does not)"
    if setting("prefill_chunk_size"):
        return "a prompt that is read in parts: the last rows of a part are not the question"
    tensors = [name for name, value in call.items() if isinstance(value, Tensor) and name not in ("inputs", "input_ids", *_FOLLOW)]
    if tensors:
        return f"it is given {', '.join(tensors)}, of which it is not known what belongs to which token"
    mask = call.get("attention_mask")
    return "" if mask is None or mask.shape == ids.shape else "the attention mask is not one of padding"


def _lengths(model: Any, call: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """max_new_tokens instead of a max_length that counts the caller's prompt of so many tokens."""
    config = call.get("generation_config") or model.generation_config
    if call.get("max_new_tokens") is not None or config.max_new_tokens is not None:
        return {}
    longest = call.get("max_length") or config.max_length
    return {} if longest is None else {"max_new_tokens": longest - tokens, "max_length": None}
