"""The ways in which the sweep calls a model: a prompt, a padded batch, a prompt in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from tests.sweep.inputs import Inputs

# models that take only a cache that they made
_OWN_CACHE = ("minimax", "recurrent_gemma", "cpmant", "blt")
# by which forwards take what they kept of earlier tokens, and outputs give it
_STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_RESULTS = ("logits", "prediction_logits", "last_hidden_state", "lm_logits", "language_model_outputs")
_LOWEST, _HIGHEST = 3, 100  # tokens of text; special ones lie outside


@dataclass
class Encoded(BaseModelOutput):
    """What an encoder gave, to be given to its decoder again; some decoders ask for more than states, which may be absent."""

    attention_mask: Tensor | None = None
    router_logits: Any = None


@dataclass(frozen=True)
class Lengths:
    """prompt: tokens; chunk: of them in the first call; padding: columns; decoder, decoder_chunk: of an encoder-decoder's answer."""

    prompt: int = 200
    chunk: int = 150
    padding: int = 37
    decoder: int = 120
    decoder_chunk: int = 80


SHORT = Lengths(prompt=64, chunk=48, padding=11, decoder=60, decoder_chunk=40)  # for models that loop over tokens in Python


@dataclass(frozen=True)
class Scenario:
    """call(model) returns numbers [batch, n, ...]; rows: bool [batch, n], those that are compared, None for all."""

    name: str
    call: Callable[[nn.Module], Tensor]
    rows: Tensor | None = None


def scenarios(model: nn.Module, inputs: Inputs, lengths: Lengths) -> list[Scenario]:
    """What is called of a model, depending on what its forward takes."""
    names = takes(model)
    if "decoder_input_ids" in names:
        return _encoder_decoder(inputs, lengths)
    if inputs.encoder:
        return _encoder(inputs, lengths)
    return _decoder(inputs, lengths)


def takes(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(_LOWEST, _HIGHEST, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, lengths: Lengths) -> dict[str, Tensor]:
    """Two rows, the first with padding."""
    mask = torch.ones(2, lengths.prompt, dtype=torch.long)
    mask[0, : lengths.padding] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": text(2, lengths.prompt) * mask, "attention_mask": mask}


def _result(output: Any) -> Tensor:
    for name in _RESULTS:
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor) and value.dim() >= 2)


def _without_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in takes(model) else {}


def _decoder(inputs: Inputs, lengths: Lengths) -> list[Scenario]:
    def prefill(model: nn.Module) -> Tensor:
        given = inputs.beside(model, text(1, lengths.prompt))
        return _result(model(**given, **_without_cache(model)))

    batch = padded("left", lengths)

    def left(model: nn.Module) -> Tensor:
        given = inputs.beside(model, batch["input_ids"], first=lengths.padding)
        return _result(model(**given, attention_mask=batch["attention_mask"], **_without_cache(model)))

    def chunks(model: nn.Module) -> Tensor:
        given, name = inputs.beside(model, text(1, lengths.prompt)), _state_name(model)
        state, results = _empty_state(model, name), []
        for part in (slice(0, lengths.chunk), slice(lengths.chunk, lengths.prompt)):
            more = {} if state is None else {name: state}
            output = model(**inputs.part(given, part), use_cache=True, **more)
            state = getattr(output, name, None)
            if state is None:
                raise NotImplementedError(f"the output has no {name}")
            results.append(_result(output))
        return torch.cat(results, 1)

    return [Scenario("prefill", prefill), Scenario("left", left, batch["attention_mask"].bool()), Scenario("chunks", chunks)]


def _state_name(model: nn.Module) -> str:
    names = takes(model)
    found = next((name for name in _STATES if name in names), "past_key_values" if "kwargs" in names else "")
    if not found:
        raise NotImplementedError("the model takes no cache")
    return found


def _empty_state(model: nn.Module, name: str) -> DynamicCache | None:
    config: Any = model.config
    if name not in ("cache", "past_key_values") or config.model_type in _OWN_CACHE:
        return None
    return DynamicCache(config=config.get_text_config(decoder=True))


def _encoder(inputs: Inputs, lengths: Lengths) -> list[Scenario]:
    made = [Scenario("prefill", lambda model: _result(model(**inputs.beside(model, text(1, lengths.prompt)))))]
    for side in ("right", "left"):
        batch = padded(side, lengths)

        def call(model: nn.Module, batch: dict[str, Tensor] = batch) -> Tensor:
            return _result(model(**inputs.beside(model, batch["input_ids"]), attention_mask=batch["attention_mask"]))

        made.append(Scenario(side, call, batch["attention_mask"].bool()))
    return made


def _encoder_decoder(inputs: Inputs, lengths: Lengths) -> list[Scenario]:
    batch = padded("right", lengths)
    answer = lambda rows, length: inputs.answer(text(rows, length, seed=1))

    def source(model: nn.Module, rows: int) -> dict[str, Any]:
        """What the encoder reads: sound or images, or text, of which two rows are padded."""
        given = inputs.source(model, rows)
        return given if given is not None else batch if rows > 1 else {"input_ids": text(1, lengths.prompt)}

    def prefill(model: nn.Module) -> Tensor:
        return _result(model(**source(model, 1), decoder_input_ids=answer(1, lengths.prompt), **_without_cache(model)))

    def right(model: nn.Module) -> Tensor:
        return _result(model(**source(model, 2), decoder_input_ids=answer(2, lengths.decoder), **_without_cache(model)))

    def chunks(model: nn.Module) -> Tensor:
        tokens, name = answer(1, lengths.decoder), _state_name(model)
        first = model(**source(model, 1), decoder_input_ids=tokens[:, : lengths.decoder_chunk], use_cache=True)
        encoded = Encoded(last_hidden_state=first.encoder_last_hidden_state)
        state = {name: getattr(first, name)}
        second = model(encoder_outputs=encoded, decoder_input_ids=tokens[:, lengths.decoder_chunk :], use_cache=True, **state)
        return torch.cat([_result(first), _result(second)], 1)

    return [Scenario("prefill", prefill), Scenario("right", right), Scenario("chunks", chunks)]
