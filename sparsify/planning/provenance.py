"""Where a calibrated plan comes from, and whether it was made for a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from sparsify.errors import PlanError
from sparsify.planning.decision import STRICT

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


@dataclass
class Provenance:
    """How a plan was calibrated.

    model: digest of the model, see `model_digest`. model_type: its kind, for messages.
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
    versions: of what made it.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    model: str
    model_type: str
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
    versions: dict[str, str] = field(default_factory=dict)
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


def model_kind(model: nn.Module) -> str:
    """A model's type as its configuration names it, else its class."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def other_model(digest: str, kind: str, model: nn.Module) -> str:
    """What a model is, in words, where something was made for another one of this digest and kind; empty where it is the same."""
    if digest == model_digest(model):
        return ""
    own = model_kind(model)
    return f"this {own} has another configuration or other weights" if kind == own else f"this is a {own}"


def check_model(found: Provenance | None, model: nn.Module, where: str) -> None:
    """Raises PlanError where a plan was calibrated on another model. A plan without provenance says nothing about that."""
    what = "" if found is None else other_model(found.model, found.model_type, model)
    if found is None or not what:
        return
    raise PlanError(
        f"the plan was calibrated on another model: on a {found.model_type}, and {what}",
        where=where,
        hint="calibrate this model with `sparsify calibrate`, or remove the plan's provenance to use it all the same",
    )
