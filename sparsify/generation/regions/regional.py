"""Compiles each kind of decoder layer of a model once and calls the result for all layers of that kind.

A call that this cannot serve is captured whole, as `model.compile(backend="sparsify")` would do it. Mostly that shows before the first
layer runs, and the call starts again. Where it shows later, the layer at hand runs uncompiled in this call, and later calls are captured
whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import pipeline
from sparsify.distributed import agreement
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.regions import bypass, caches, images, left_out, long_rows, masks, running, tokens
from sparsify.generation.regions.context_parallel import DividedCalls
from sparsify.generation.regions.layers import NotShared
from sparsify.generation.regions.long_rows import LongRows
from sparsify.generation.regions.narrowing import Narrowing
from sparsify.generation.regions.running import Call, Handover
from sparsify.generation.regions.shared import SharedLayers
from sparsify.graph import compat
from sparsify.graph.typed_torch import within_transform
from sparsify.pipeline import WHOLE
from sparsify.planning import unmatched
from sparsify.planning.choose import named_methods
from sparsify.planning.config.config import Config

log = logging.getLogger(__name__)


class WholeModel:
    """A model's call, captured as one graph, before which caches are given room; plans made in it tell the reason.

    reason: empty where that was asked for.
    """

    def __init__(self, call: Callable[..., Any], reason: str = ""):
        self.call, self.reason = call, reason
        if reason:
            log.warning("captured whole, not layer by layer: %s", reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            for cache in (value for name, value in kwargs.items() if name in caches.CACHES):
                caches.settle(cache, _tokens(args, kwargs))
        if not self.reason:
            return self.call(*args, **kwargs)
        plans = pipeline.collector.get()
        before = 0 if plans is None else len(plans)
        result = self.call(*args, **kwargs)
        for plan in (plans or ())[before:]:
            plan.capture = f"whole: {self.reason}"
        return result


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of a model's call, padding included."""
    given = (*(kwargs.get(name) for name in ("input_ids", "inputs_embeds")), *args, *kwargs.values())  # a mask is as long as the text
    return next((value.shape[1] for value in given if isinstance(value, Tensor) and value.dim() > 1), 1)


class RegionalModel:
    """What `sparsify.compile` puts in the place of a model's call.

    Args:
        model: a model of transformers whose attention goes through its AttentionInterface.
        whole: the model's call, captured as one graph, for calls that regions cannot serve.
        options: the user's, an object that all graphs of the model share.
        dynamic: as in torch.compile; None means sizes that vary from the first call on.
        text: this process's share of a prompt's tokens; None: it has all of them.

    Raises:
        NotShared: the layers of this model share no regions, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        whole: Callable[..., Any],
        options: Any = None,
        dynamic: bool | None = None,
        text: Shard | None = None,
    ):
        _check_model(model, config)
        self.model, self.config, self.whole, self.options = model, config, whole, options
        self.dynamic = True if dynamic is None else dynamic
        self.shared = SharedLayers(model, config, options, self.dynamic, text, running.note_compiling)
        self.divided = None if text is None else DividedCalls(model, text)
        self.tokens = None
        found = self.shared
        if found.narrowing is None and found.bypass is None and text is None and found.part == WHOLE and tokens.pays(found.layers, config):
            make = lambda function: found.make_region((), function, dynamic=None)
            self.tokens = tokens.Tokens(model, found.layers, make, found.towers.layers)
        self._wholes: dict[str, WholeModel] = {}
        attention = next(part for part in found.layers[0].module.modules() if hasattr(part, "config"))
        cache_attention.use_sparse_attention(attention.config)

    @property
    def reason(self) -> str:
        """Why no call is served by regions any more; empty while they serve."""
        return self.shared.reason

    @property
    def narrowing(self) -> Narrowing | None:
        return self.shared.narrowing

    @property
    def bypass(self) -> bypass.Bypass | None:
        return self.shared.bypass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # someone else captures the model within something larger
            return self.model._call_impl(*args, **kwargs)
        if any(caches.keeps_past(kwargs.get(name)) for name in caches.CACHES):
            log.info("drafts over a cache that evicts run uncompiled")
            return self.model._call_impl(*args, **kwargs)
        if why := compat.captures_nothing():
            if self.divided is not None:
                raise UnsupportedError(f"a prompt is divided among processes, and nothing is compiled: {why}", where="context parallelism")
            compat.told_uncompiled(why, self.shared.config.strict)
            return self.model._call_impl(*args, **kwargs)
        try:
            if self.divided is not None:
                return self.divided(self._as_alone, args, kwargs)
            return self._as_alone(*args, **kwargs)
        except NotShared as why:
            reason, lasting = str(why), why.lasting
        except RuntimeError as error:
            if self.shared.part == WHOLE or not agreement.is_loss(error):
                raise
            raise agreement.stopped(error, type(self.model).__name__) from error
        if self.divided is not None:
            raise UnsupportedError(f"a prompt is divided among processes, and layers share no code: {reason}", where="context parallelism")
        if reason not in self._wholes:
            self._wholes[reason] = WholeModel(self.whole, reason)
        tokens = _tokens(args, kwargs)
        masked = kwargs.get("attention_mask") is not None
        for cache in (value for name, value in kwargs.items() if name in caches.CACHES):
            for held in getattr(cache, "layers", ()):
                left_out.check_whole(held, tokens, masked)
        result = self._wholes[reason](*args, **kwargs)
        if lasting:  # and not the caller's mistake, which would have been raised
            self.shared.reason = reason
        return result

    def _as_alone(self, *args: Any, **kwargs: Any) -> Any:
        """The call, of this process's tokens if prompts are divided."""
        self._check_call(args, kwargs)
        if self.tokens is not None and not self._shows_rows(kwargs) and (result := self.tokens(args, kwargs)) is not NotImplemented:
            return result
        return self._through_regions(args, kwargs)

    def _shows_rows(self, kwargs: Mapping[str, Any]) -> bool:
        return bool(kwargs.get("output_hidden_states", getattr(self.model.config, "output_hidden_states", False)))

    def _through_regions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(self.shared, lambda shape: images.find(self.model, args, kwargs, shape))
        call.shows_rows = self._shows_rows(kwargs)
        entered = running.active.set(call), masks.postponing.set(True)
        try:
            result = self.model._call_impl(*args, **kwargs)
        except BaseException:
            if call.narrowed is not None and not call.ran:
                call.narrowed.take_back()
            raise
        finally:
            masks.postponing.reset(entered[1])
            running.active.reset(entered[0])
        if call.compiled and self.config.rules:
            unmatched.conclude(self.config, self.options)
        return result

    def _check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises NotShared with what speaks against regions before anything runs."""
        if self.reason:
            raise NotShared(self.reason)
        if within_transform():  # inside of which Dynamo captures nothing
            raise NotShared("a transform of torch.func is open around the call")
        config = self.model.config
        for name in ("output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(config, name, False)):
                raise NotShared(f"{name} asks for what a layer computes inside")
        cache = next((value for name, value in kwargs.items() if name in caches.CACHES and value is not None), None)
        if cache is not None and (why := caches.trouble(cache, len(self.shared.layers))):
            raise NotShared(why)
        if not any(isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == 1 for value in (*args, *kwargs.values())):
            self.shared.watch.look_again()  # at prompts, which take long beside it
        if why := self.shared.watch.trouble():
            raise NotShared(why)
        if self.shared.watch.divides and torch.is_grad_enabled():
            raise NotShared("gradients are enabled, and tensor parallelism divides the model")


def _check_model(model: nn.Module, config: Config) -> None:
    """Raises NotShared where the model, or what is asked of it, leaves no choice but to capture it whole."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise NotShared("it is no model of transformers")
    if not getattr(model, "_supports_attention_backend", False):
        raise NotShared("its attention does not go through transformers' AttentionInterface")
    text = model.config.get_text_config(decoder=True)
    base = text._attn_implementation
    if base is not None and base not in cache_attention.NAMES and base not in cache_attention.NAMES.values():
        raise NotShared(f"its attention implementation is {base!r}")
    if getattr(text, "is_encoder_decoder", False) or getattr(text, "num_kv_shared_layers", 0):
        raise NotShared("its layers share keys and values")
    if config.inductor_patches().get("triton.cudagraphs"):
        raise NotShared("CUDA graphs are recorded over the whole model")
    across = sorted(name for name, method in named_methods(config).items() if method.across_layers)
    if across:
        raise NotShared(f"{', '.join(across)} acts across layers")


def install(model: nn.Module, config: Config, options: Any, dynamic: bool | None, text: Shard | None = None) -> None:
    """Lets calls of a model, which was compiled as a whole, go through regions; says why not where that cannot be.

    Raises:
        UnsupportedError: it cannot be, and prompts are to be divided among processes (`text`).
    """
    whole = model._compiled_call_impl
    if whole is None:
        raise ValueError("the model is not compiled")
    try:
        regional = RegionalModel(model, config, whole, options, dynamic, text)
    except NotShared as why:
        if text is not None:
            raise UnsupportedError(f"layers share no code: {why}", where="context parallelism") from None
        model._compiled_call_impl = WholeModel(whole, str(why))
        return
    for layer in (*regional.shared.layers, *regional.shared.towers.layers):
        layer.module._compiled_call_impl = Handover(layer)
    for module in long_rows.find_norms(model, regional.shared.layers):
        module._compiled_call_impl = LongRows(module, config)
    model._compiled_call_impl = regional


def keep_whole(model: nn.Module) -> None:
    """Lets calls of a model that is compiled as a whole give caches room."""
    if model._compiled_call_impl is not None:
        model._compiled_call_impl = WholeModel(model._compiled_call_impl)


def remove(model: nn.Module) -> None:
    """Takes back `install`."""
    for part in model.modules():
        if isinstance(part._compiled_call_impl, Handover | LongRows | RegionalModel | WholeModel):
            part._compiled_call_impl = None


def bypass_of(model: Any) -> bypass.Bypass | None:
    """How a compiled model's generated tokens bypass layers; None where they run all of them."""
    own = getattr(model, "_compiled_call_impl", None)
    return own.bypass if isinstance(own, RegionalModel) else None


def shares_prompts(model: Any) -> Shard | None:
    """This process's share of the prompts of a model that was compiled with a mesh; None where it has all of them."""
    own = getattr(model, "_compiled_call_impl", None)
    return own.divided.shard if isinstance(own, RegionalModel) and own.divided is not None else None


def captured_like(model: nn.Module, config: Config, whole: Callable[..., Any]) -> Callable[..., Any]:
    """A separate call of the model with other settings, captured as its own calls are: layer by layer, or whole.

    Args:
        whole: the model's call, captured as one graph.
    """
    own = model._compiled_call_impl
    if isinstance(own, WholeModel):
        return WholeModel(whole, own.reason)
    if not isinstance(own, RegionalModel):
        return whole
    try:
        return RegionalModel(model, config, whole, config, own.dynamic, own.divided and own.divided.shard)
    except NotShared as why:
        return WholeModel(whole, str(why))
