"""A tiny configuration of any of transformers' classes: sizes by the names of the fields, and one layer of each kind of layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from tests.support.tiny_overrides import DROP
from tests.support.tiny_sizes import POSITIONS, VOCAB, shrunk, size_of

_NOT_OURS = {"transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype", "name_or_path", "is_encoder_decoder"}
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKEN = re.compile(r".*(token_id|token_index|token_ids|_idx|start_id|end_id|_id)")
_MOST_KINDS = 6  # of layers
_ROTARY_FREQUENCIES = 8  # half of a tiny head


def tiny_config(
    kind: type[PreTrainedConfig],
    *,
    kv_heads: int = 2,
    layers: int = 2,
    by_layer: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A configuration of this class.

    Args:
        kv_heads: at most so many; heads are four.
        layers: so many, more where there are more kinds of layers; nested configurations have at most so many.
        by_layer: whether lists with an entry per layer keep one entry of each kind; without, the class makes them itself.
        overrides: fields that are not as the names say; nested for nested configurations; `DROP` leaves a field to the class.
    """
    return kind(**_merged(_arguments(kind, kv_heads, layers, by_layer, VOCAB - 2, overrides=overrides), overrides or {}))


def default_config(kind: type[PreTrainedConfig], overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The class's own configuration, with these fields where it has none that holds by itself."""
    try:
        return kind()
    except Exception:
        return kind(**(overrides or {}))


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in _NOT_OURS}


def _arguments(
    kind: type[PreTrainedConfig],
    kv_heads: int,
    layers: int,
    by_layer: bool,
    token: int,
    nested: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """token: the highest identifier that is free for a special token; nested configurations get others than what they stand in."""
    fields = _fields(default_config(kind, overrides))
    count = _count_of_layers(kind, fields)
    lists = _lists_by_layer(fields, fields[count]) if by_layer and count else {}
    kept = _one_of_each(lists, fields[count], layers) if lists and count else []
    tokens, token = _special_tokens(fields.items(), token)
    small = lambda name, value: shrunk(name, value, kv_heads, layers)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            inner = _arguments(type(value), kv_heads, layers, by_layer, token, nested=True)
            made[name] = {**inner, "model_type": type(value).model_type}
        elif name in tokens:
            made[name] = tokens[name]
        elif name in lists:
            made[name] = [small(name, value[layer]) for layer in kept]
        elif name == count and (kept or not nested):
            made[name] = len(kept) or layers
        elif value is None and size_of(name) == "kv_heads":
            made[name] = kv_heads
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            made[name] = _tiny_rope(value)
        elif isinstance(value, list | tuple) and value and all(isinstance(one, int) for one in value):
            made[name] = [small(name, one) for one in value]
        else:
            made[name] = small(name, value)
    if "vocab_size" in fields and fields.get("pad_token_id", 0) is None:
        made["pad_token_id"] = 0
    made |= _latent_heads(fields, made)
    return {name: value for name, value in made.items() if name not in fields or value != _plain(fields[name])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _count_of_layers(kind: type[PreTrainedConfig], fields: Mapping[str, Any]) -> str | None:
    mapped = getattr(kind, "attribute_map", {}).get("num_hidden_layers")
    return next((name for name in (*_COUNTS, mapped) if isinstance(fields.get(name), int)), None)


def _lists_by_layer(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    is_list = lambda value: isinstance(value, list | tuple) and len(value) == count > 1
    return {n: v for n, v in fields.items() if is_list(v) and not any(isinstance(one, PreTrainedConfig) for one in v)}


def _one_of_each(lists: Mapping[str, Any], count: int, layers: int) -> list[int]:
    """Numbers of layers such that each kind is there, filled up to `layers`."""
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    kept = list(kinds.values())[:_MOST_KINDS]
    kept += [layer for layer in range(count) if layer not in kept][: max(0, layers - len(kept))]
    return sorted(kept)


def _special_tokens(fields: Iterable[tuple[str, Any]], token: int) -> tuple[dict[str, Any], int]:
    """Special tokens that do not fit the vocabulary: distinct identifiers, from the top."""
    found: dict[str, Any] = {}
    for name, value in fields:
        if not _TOKEN.fullmatch(name) or isinstance(value, bool):
            continue
        if isinstance(value, int) and value >= VOCAB:
            found[name], token = token, token - 1
        elif isinstance(value, list | tuple) and any(isinstance(one, int) and one >= VOCAB for one in value):
            found[name], token = [token], token - 1
    return found, token


def _latent_heads(fields: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, int]:
    """Multi-head latent attention: the sizes that follow from the rotated and the plain part of a head."""
    rotated, plain = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if not isinstance(rotated, int) or not isinstance(plain, int):
        return {}
    sums = {rotated + plain: made["qk_rope_head_dim"] + made["qk_nope_head_dim"], rotated: made["qk_rope_head_dim"]}
    return {name: sums[fields[name]] for name in ("head_dim", "qk_head_dim") if fields.get(name) in sums}


def _tiny_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    parameters = copy.deepcopy(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            parameters[name] = _tiny_rope(value)
        elif name == "mrope_section":
            parameters[name] = [2, 3, 3] if len(value) == 3 else [2] * 4
        elif name in ("long_factor", "short_factor"):
            parameters[name] = [1.0] * _ROTARY_FREQUENCIES
        elif name == "original_max_position_embeddings":
            parameters[name] = min(value, POSITIONS)
    return parameters


def _merged(arguments: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(arguments.get(name), dict) and "rope" not in name:
            arguments[name] = _merged(arguments[name], value)
        elif value is DROP:
            arguments.pop(name, None)
        else:
            arguments[name] = copy.deepcopy(value)
    return arguments
