"""Which model a plan was made for, how it was calibrated, and whether a model is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparsify.errors import PlanError
from sparsify.graph.typed_torch import as_floats
from sparsify.planning.config.values import is_sequence
from sparsify.planning.decision import STRICT

log = logging.getLogger(__name__)

# of a model's configuration: says where it came from or how it runs, not what it is
_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "_attn_implementation",
        "attn_implementation",
        "architectures",  # written into the configuration when the model is saved
    }
)
_SAMPLES = 16  # numbers of each weight that are compared


# of a configuration, its text's or that of a part: what plans are written for. Another release may know more of them
_STRUCTURE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "layer_types",
    "sliding_window",
)
_WEIGHTS = 32  # that a plan holds numbers of
# of weights that hold numbers as they are: codes of 8 bits and fewer are floating point too
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# root mean square over weights of the relative difference of their numbers: by rounding to 16 bits; and where weights that were codes on
# the way (4 bits: about 0.1), or that were trained further, end. Those of another model differ by more than 1.
_ROUNDED, _DESCENDED = 5e-3, 0.3


@dataclass
class Weight:
    """Some numbers of a weight, evenly spaced. shape: of the weight."""

    __pydantic_config__: ClassVar[Any] = STRICT
    shape: list[int]
    numbers: list[float]


@dataclass
class Provenance:
    """Which model a plan was made for.

    model_type: its kind, as `model_kind` has it.
    structure: numbers of layers, heads and the like, under the configuration's names; empty where the model has none.
    weights: numbers of some weights, by the weight's name, where what the plan says was measured with them; else empty.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    model_type: str
    structure: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)


@dataclass
class Calibration:
    """How a plan was calibrated.

    text: SHA-256 of the tokens. settings: of what was tried.
    lengths: tokens of the prompts that were run. pieces: how many of each. seed: that chose them. last: tokens at the end of each, if any,
        that weighed as much as all others.
    budget: what was asked for, such as {"keep_error": 0.05}.
    at: length in tokens for which time was minimised. target: device that the times are for.
    seconds, dense_seconds: there, predicted: of all calibrated attention, or of a whole prompt where tokens were. density: share of
        attention's blocks.
    errors: by length, as measured: the root mean square over layers of ‖o' - o‖ / ‖o‖ of attention, nats a token of an answer where tokens
        were calibrated.
    losses: by length, of attention whose settings were compared by it: nats a token, predicted by gradients. lost: of the longest, by
        running the plan.
    gap: how far the time or error may lie above the least possible one, relatively.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    text: str
    settings: str
    lengths: list[int]
    pieces: list[int]
    seed: int
    budget: dict[str, float]
    at: int
    target: str
    seconds: float
    dense_seconds: float
    density: float
    errors: dict[str, float]
    gap: float
    last: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    lost: float | None = None


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Hex SHA-256 of a model: its configuration, and the name, shape and some numbers of every weight, as bfloat16.

    The same for a model that was moved, or loaded in another dtype of no less precision.
    """
    config: Any = getattr(model, "config", None)
    every: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    known = {key: value for key, value in every.items() if key not in _NOT_THE_MODEL}
    state = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    samples: list[torch.Tensor] = []
    for name, weight in model.named_parameters():
        state.update(f"{name} {tuple(weight.shape)}\n".encode())
        if type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            samples.append(flat[::step][:_SAMPLES].to(torch.bfloat16))
    for device in dict.fromkeys(one.device for one in samples):
        together = torch.cat([one for one in samples if one.device == device])
        state.update(together.cpu().view(torch.int16).numpy().tobytes())
    return state.hexdigest()


def unwrapped(model: Any) -> Any:
    """The module inside those that torch.compile, DataParallel and DistributedDataParallel make, in any order."""
    inner = model
    while inner is not None:
        model, inner = inner, getattr(inner, "_orig_mod", None)
        if inner is None and issubclass(type(model), (DataParallel, DistributedDataParallel)):
            inner = model.module
    return model


def model_kind(model: nn.Module) -> str:
    """A model's type as its configuration names it, else its class."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def other_model(digest: str, kind: str, model: nn.Module) -> str:
    """What a model is, in words, where something was made for another one of this digest and kind; empty where it is the same."""
    if digest == model_digest(model):
        return ""
    own = model_kind(model)
    return f"this {own} has another configuration or other weights" if kind == own else f"this is a {own}"


def provenance_of(model: nn.Module, measured: bool = False) -> Provenance:
    """Of a plan that is made for a model, or for what wraps it. measured: what the plan says was measured with the model's weights."""
    model = unwrapped(model)
    return Provenance(model_kind(model), _structure(model), _some_weights(model) if measured else {})


def check_model(found: Provenance | None, model: nn.Module, where: str) -> None:
    """Checks that a plan was made for a model, wrapped or not, as far as one can tell; warns where weights are others of the same origin.

    The structure is compared where both configurations know it, and weights where both have them in one piece and as numbers: neither how a
    model runs (dtype, device, attention implementation, tensor parallelism) nor weights as codes make it another one.

    Args:
        found: None, as in plans of single graphs: nothing is known.
        where: the plan's file, for messages.

    Raises:
        PlanError: it was made for another model.
    """
    if found is None:
        return
    model = unwrapped(model)
    kind, structure = model_kind(model), _structure(model)
    other = "" if kind == found.model_type else f"this is a {kind}"
    for name in found.structure.keys() & structure.keys() if not other else ():
        if found.structure[name] != structure[name]:
            other = f"this {kind} has {name} = {structure[name]}, not {found.structure[name]}"
    off = 0.0 if other else _distance(found.weights, model)
    if off > _DESCENDED:
        other = f"this {kind} has other weights"
    if other:
        made = "calibrated on" if found.weights else "made for"
        again = "calibrate this model with `sparsify calibrate`" if found.weights else "make one with `sparsify explain --save`"
        raise PlanError(
            f"the plan was {made} another model: {made.split()[1]} a {found.model_type}, and {other}",
            where=where,
            hint=f"{again}, or remove the plan's provenance to use it all the same",
        )
    if off > _ROUNDED:
        log.warning(
            "%s: the plan was calibrated on weights that differ by %.2g from these, relatively: what it measured may not hold", where, off
        )


def _structure(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    parts = {"": config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config}
    parts |= {f"{name}.": part for name in getattr(config, "sub_configs", {}) if (part := getattr(config, name, None)) is not parts[""]}
    found: dict[str, Any] = {}
    for prefix, part in parts.items():
        for name in _STRUCTURE:
            value: Any = getattr(part, name, None)
            if is_sequence(value) or isinstance(value, int):
                found[prefix + name] = list(value) if is_sequence(value) else value
    return found


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight holds all of its numbers, as they are."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in _PLAIN and not weight.is_meta and weight.numel() > 0


def _numbers(weight: torch.Tensor) -> list[float]:
    """Some numbers of a weight that is plain, evenly spaced."""
    flat = weight.detach().reshape(-1)
    return as_floats(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float())


@torch.no_grad()
def _some_weights(model: nn.Module) -> dict[str, Weight]:
    found: list[tuple[str, Weight]] = []
    for name, weight in model.named_parameters():
        numbers = _numbers(weight) if _is_plain(weight) else []
        if any(numbers) and all(map(math.isfinite, numbers)):  # zeros, as biases begin, have no relative difference
            found.append((name, Weight(list(weight.shape), [float(f"{number:.5g}") for number in numbers])))
    step = max(1.0, (len(found) - 1) / (_WEIGHTS - 1))
    return dict(found[round(i * step)] for i in range(min(len(found), _WEIGHTS)))


@torch.no_grad()
def _distance(known: dict[str, Weight], model: nn.Module) -> float:
    """How far a model's weights are from known ones, relatively, over those that can be compared; 0 where none can."""
    weights, squares = dict(model.named_parameters()), list[float]()
    for name, one in known.items():
        weight = weights.get(name)
        size = math.hypot(*one.numbers)
        if size and weight is not None and list(weight.shape) == one.shape and _is_plain(weight):
            off = math.dist(_numbers(weight), one.numbers)
            squares.append((off / size) ** 2 if off <= 2 * size else 4.0)  # NaN is not near anything
    return math.sqrt(sum(squares) / max(1, len(squares)))
