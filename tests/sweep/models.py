"""The model of a type that is checked: tiny, whole where that can be called, else its language decoder alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.tiny_configs import default_config, tiny_config
from tests.support.tiny_models import build_class, spread_weights
from tests.support.tiny_overrides import OVERRIDES
from tests.sweep.images import ImageInputs, image_inputs
from tests.sweep.inputs import Inputs, inputs_of
from tests.sweep.lists import CAUSAL, LISTS
from tests.sweep.scenarios import SHORT, Lengths, Scenario, scenarios
from tests.sweep.seen import Seen

# what cannot be called by itself, or needs packages beside transformers
NOT_BUILT = {
    "gemma3n": "its vision tower needs timm; its text model is on the list as gemma3n_text",
}
_MANY_CALLS = 2500  # of torch's functions in a prompt: a model that loops over tokens
_TEXT_PARTS = ("text_config", "decoder_config", "llm_config", "thinker_config", "decoder")
_CHOSEN = ("index_topk", "index_topk_blocks", "indexer_budget")  # keys or blocks that a row attends to
_SIZES = (
    {"kv_heads": 2, "layers": 2, "by_layer": True},
    {"kv_heads": 4, "layers": 2, "by_layer": True},
    {"kv_heads": 2, "layers": 4, "by_layer": False},
    {"kv_heads": 4, "layers": 4, "by_layer": False},
    {"kv_heads": 2, "layers": 8, "by_layer": False},
)


class NotBuilt(Exception):
    """No tiny model of this type can be made and called; `reasons` says what was tried."""

    def __init__(self, reasons: list[str]):
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Built:
    """part: the class of the language decoder where only that can be called, empty for a whole model. sees: whether it gets images."""

    model: nn.Module
    scenarios: list[Scenario]
    part: str = ""
    sees: bool = False


def build(which: str, model_type: str, attention: str | None) -> Built:
    """A model of the type that has run a prompt. attention: "eager", or None for what transformers chooses by itself.

    Raises:
        NotBuilt: none of the sizes that are tried can be called.
    """
    if model_type in NOT_BUILT:
        raise NotBuilt([NOT_BUILT[model_type]])
    failures: list[str] = []
    for make in _ways(which, model_type, attention):
        try:
            model, part = make()
            spread_weights(model)
        except Exception as error:
            failures.append(brief(error))
            continue
        for inputs in [Inputs()] if part else _inputs(which, model_type, model):
            try:
                return Built(model, _called(model, inputs), part, isinstance(inputs, ImageInputs))
            except Exception as error:
                failures.append(brief(error))
    raise NotBuilt(list(dict.fromkeys(failures)))


def brief(error: BaseException, letters: int = 200) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:letters]


def _inputs(which: str, model_type: str, model: nn.Module) -> Iterator[Inputs]:
    """What a whole model may be given: images if it takes them, and nothing but text."""
    if which == "multimodal":
        yield from image_inputs(model)
    yield inputs_of(which, model_type)


def _ways(which: str, model_type: str, attention: str | None) -> Iterator[Callable[[], tuple[nn.Module, str]]]:
    """Functions that make (a model, the name of a part): the whole in several sizes, then its language decoder."""
    model_class = LISTS[which].class_of(model_type)
    default = default_config(model_class.config_class, OVERRIDES.get(model_type))
    more = {name: True for name in ("is_decoder", "causal") if which == CAUSAL and hasattr(default, name)}
    whole = lambda sizes: build_class(model_class, attention, overrides=more, **sizes)
    for sizes in _SIZES:
        yield lambda sizes=sizes: (whole(sizes), "")
    if which == CAUSAL:
        return
    for sizes in _SIZES:
        yield lambda sizes=sizes: _language_model(whole(sizes))
    for auto, kv_heads in itertools.product((transformers.AutoModelForCausalLM, transformers.AutoModel), (2, 4)):
        yield lambda auto=auto, kv_heads=kv_heads: _from_text_config(auto, model_class.config_class, kv_heads, attention)


def _language_model(whole: Any) -> tuple[nn.Module, str]:
    found = (getattr(whole, "language_model", None), getattr(getattr(whole, "model", None), "language_model", None), whole.get_decoder())
    part = next(one for one in found if isinstance(one, nn.Module) and one is not whole)
    return part, type(part).__name__


def _from_text_config(auto: Any, kind: Any, kv_heads: int, attention: str | None) -> tuple[nn.Module, str]:
    default = kind()
    text = next(getattr(default, name) for name in _TEXT_PARTS if getattr(default, name, None) is not None)
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    fields = OVERRIDES.get(kind.model_type, {}).get("text_config")
    part = auto.from_config(tiny_config(type(text), kv_heads=kv_heads, overrides=fields), dtype=torch.float32, **chosen).eval()
    return part, type(part).__name__


def trains_sparsity(config: Any) -> bool:
    """Whether the model was trained to choose keys or blocks of keys itself (an indexer), which a method could only choose among again."""
    text = config.get_text_config(decoder=True)
    return any(getattr(text, name, None) is not None for name in _CHOSEN)


@torch.no_grad()
def _called(model: nn.Module, inputs: Inputs) -> list[Scenario]:
    """What is called of a model, at lengths that it runs in reasonable time. Raises what its first call does."""
    made = scenarios(model, inputs, Lengths())
    with Seen() as seen:
        made[0].call(model)
    return scenarios(model, inputs, SHORT) if seen.calls > _MANY_CALLS else made
