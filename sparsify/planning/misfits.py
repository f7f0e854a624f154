"""Options that fit no layer of a model: lists of another length than there are heads, layers and heads that do not exist.

What is written wrongly is an error that says where it is written. Whether a site of one layer takes an option is another question, for
`propose`: layers of a model may differ in their heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from sparsify.errors import ConfigError, PlanError
from sparsify.planning.config.config import Config
from sparsify.planning.config.values import is_sequence
from sparsify.planning.method import Pass
from sparsify.planning.registry import discover
from sparsify.planning.saved_plan import SavedPlan

_HEADS = re.compile(r"(^|_)n?_?heads?(_per_layer)?$")


def check_model(settings: Config, saved: SavedPlan | None, model_config: Any) -> None:
    """Checks every option that may be for one head or one layer against a model's configuration, as far as that tells.

    Args:
        saved: the plan file that the settings name.
        model_config: of transformers; None or another object: nothing is known.

    Raises:
        ConfigError: an option of the settings fits no layer of the model.
        PlanError: one of the plan file does not.
    """
    heads, layers = _heads(model_config), _layers(model_config)
    for where, name, options in _written(settings):
        for option, why in discover()[name](**options).misfits(heads, layers):
            raise ConfigError(why, where=f"{where}.{option}")
    for index, decision in enumerate(() if saved is None else saved.plan.decisions):
        if decision.method is not None:
            for option, why in discover()[decision.method](**decision.options).misfits(heads, layers):
                raise PlanError(why, where=f"{saved.where if saved else ''}: decisions[{index}].options.{option}")


def check_sites(asked: Iterable[tuple[Pass, int]]) -> None:
    """Checks the options of methods that sites of one graph were asked for. asked: each with a number of query heads that a site may have.

    Raises:
        ConfigError: an option fits none of the sites.
    """
    seen: dict[Pass, set[int]] = {}
    for method, heads in asked:
        seen.setdefault(method, set()).add(heads)
    for method, heads in seen.items():
        for option, why in method.misfits(heads, 0):
            raise ConfigError(why, where=f"{method.name}.{option}")


def _written(settings: Config) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Where methods that may act get options, which method, and all of its options there."""
    for name in settings.every_pass:
        yield name, name, settings.methods.get(name, {})
    for index, rule in enumerate(settings.rules):
        for name in rule.method:
            yield f"rules[{index}]: {name}", name, {**settings.methods.get(name, {}), **rule.options.get(name, {})}


def _parts(config: Any) -> list[Any]:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(inner for part in parts if part is not None for inner in _parts(part))]


def _heads(config: Any) -> Collection[int]:
    """All numbers of query heads that layers may have, by the names of a configuration's fields; empty where it names none."""
    found: set[int] = set()
    for part in _parts(config):
        for name, value in getattr(part, "__dict__", {}).items():
            if _HEADS.search(name) and "key_value" not in name and "kv" not in name:
                found |= {one for one in (value if is_sequence(value) else (value,)) if isinstance(one, int)}
    return found


def _layers(config: Any) -> int:
    """Decoder layers of a model; 0 where that is not known."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", 0)
    return count if isinstance(count, int) else 0
