"""What differs between the transformers releases that sparsify supports (5.17 to 5.24). Nothing else may ask for a version."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin


def stock(name: str) -> Callable[..., Any]:
    """transformers' own method of that name. Their types ask for more of `self` than the class that holds them has."""
    return getattr(GenerationMixin, name)


# the name by which `generate()` hands a cache to `prepare_inputs_for_generation` and to the model
CACHE_NAME = "cache" if "cache" in inspect.signature(stock("prepare_inputs_for_generation")).parameters else "past_key_values"


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model takes a cache: `cache` since transformers 5.24, `past_key_values` before that and in code that
    came with a checkpoint."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def generated(cache: Any, **fields: Any) -> GenerateDecoderOnlyOutput:
    """What `generate(return_dict_in_generate=True)` returns."""
    return GenerateDecoderOnlyOutput(**fields, **{CACHE_NAME: cache})


def columns(input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Tokens of the longest row, padding and what a given cache already holds included, once `generate()` has read the prompt.

    A mask covers all of them; transformers 5.24 drops one that hides nothing and notes its width.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return mask.shape[1]
    embeddings = model_kwargs.get("inputs_embeds")
    return getattr(generation_config, "_mask_length", None) or (input_ids if embeddings is None else embeddings).shape[1]


def pad_token(generation_config: Any, device: torch.device) -> Tensor:
    """The token that fills rows which have ended, int64 []. transformers keeps it beside the configuration's own fields."""
    return generation_config._pad_token_tensor.to(device)


_RECORDERS = "transformers.utils.output_capturing"


def without_recorders(hooks: Mapping[int, Any]) -> Mapping[int, Any]:
    """A module's forward hooks but for those that transformers leaves there after the first call that asked for hidden states or attention
    weights, and which do nothing in other calls."""
    if not any(getattr(hook, "__module__", "") == _RECORDERS for hook in hooks.values()):
        return hooks
    return OrderedDict((key, hook) for key, hook in hooks.items() if getattr(hook, "__module__", "") != _RECORDERS)


_PARALLEL = "transformers.distributed.tensor_parallel"


def parallel_style(module: torch.nn.Module) -> str | None:
    """How transformers' `tp_plan` divides a module whose forward it replaced.

    Returns:
        "colwise" (an output of this process's features, from whole inputs), "rowwise" (a whole output, from this process's features),
        "replicated", or the name of another style; None where the forward is not transformers'.
    """
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__module__", "") != _PARALLEL:
        return None
    inner = inspect.getclosurevars(forward).nonlocals
    if getattr(inner.get("original_forward"), "__func__", None) is not type(module).forward:
        return "several styles"
    if forward.__qualname__.startswith("ReplicatedWithGradAllReduce."):
        return "replicated"
    from torch.distributed.tensor import Replicate, Shard

    style = inner.get("self")
    kind, layouts = type(style).__name__, (getattr(style, "input_layouts", None), getattr(style, "output_layouts", None))
    if getattr(style, "use_local_output", False) and not getattr(module, "_hf_quantized_needs_local_tp", False):
        for name, at, usual in (
            ("colwise", "ColwiseParallel", (Replicate(), Shard(-1))),
            ("rowwise", "RowwiseParallel", (Shard(-1), Replicate())),
        ):
            if kind == at and layouts == usual:
                return name
    return kind
