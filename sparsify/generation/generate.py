"""`model.generate()` of models that sparsify compiled: our loop and our cache where they serve the call, transformers' own otherwise.

transformers looks its decoding methods up on the model's class. `install` therefore gives the class methods that pass calls on, and the
instance a `generate` of its own: only calls that came through that one reach our loop. (`generate(custom_generate=...)` would lose the
streamer and the tokenizer on its way.)
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from sparsify.distributed import agreement, shards
from sparsify.errors import UnsupportedError
from sparsify.generation import compat, new_prompt
from sparsify.generation.caches.kept import KeptCaches
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.decoding import call, loop, step_caches
from sparsify.generation.decoding.model_state import hooked
from sparsify.generation.decoding.runner import CudaGraphs, Direct, Recorded, Runner
from sparsify.generation.decoding.sessions import Sessions
from sparsify.generation.regions import narrowing, regional

log = logging.getLogger(__name__)

_OURS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Decoder:
    """How one model decodes, and what it keeps between calls.

    Args:
        graphs: record CUDA graphs; off where the compiled model makes its own.
        shown: show a line on the terminal while a long prompt is read.
    """

    def __init__(self, model: Any, *, graphs: bool = True, shown: bool = True):
        self._model = weakref.ref(model)
        self.graphs, self.shown = graphs, shown
        self.caches = KeptCaches()
        self.sessions: weakref.WeakKeyDictionary[Any, Sessions] = weakref.WeakKeyDictionary()
        self.unserved, self.windows = "", False  # why no SparseCache serves this model; whether layers have sliding windows
        try:
            # before anything is compiled: it makes the model's attention sparsify's, which compiled code depends on
            self.windows = any(layer.is_sliding for layer in SparseCache(model.config, "full").layers)
        except UnsupportedError as error:
            self.unserved = str(error)

    def cache_for(self, model: Any, config: Any, model_kwargs: dict[str, Any], mode: Any, rows: int, tokens: int) -> SparseCache | None:
        """An exact cache for a call that brings none; None where transformers' own is the right one.

        Args:
            config: the call's generation configuration.
            model_kwargs: what `generate()` hands to the decoding method.
            mode: transformers' GenerationMode.
            rows: sequences side by side.
            tokens: of each row in all, those to be generated included.
        """
        if mode not in _OURS or model_kwargs.get(compat.CACHE_NAME) is not None:
            return None
        if config.cache_implementation is not None or not model._supports_default_dynamic_cache():
            return None
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() > 1}
        reason = call.refusal(model, config, model_kwargs) or self.unserved
        if not reason and (model.training or dtypes != {model.dtype} or torch.is_autocast_enabled(model.device.type)):
            reason = "what dtype keys have is not known, or the model is in training mode"
        if not reason and self.windows and _padded_behind_a_token(model_kwargs.get("attention_mask")):
            reason = "there is padding behind a token, which the model's own caches count as part of its windows"
        if not reason:
            if regional.shares_prompts(model):  # each process has as much memory as its share of the prompt takes
                return SparseCache(model.config, "full")
            try:
                prompt = model_kwargs["position_ids"].shape[-1]
                return self.caches.borrow(model, rows, loop.room_for(prompt, tokens - prompt))
            except UnsupportedError as error:
                reason = self.unserved = str(error)
            except torch.OutOfMemoryError as error:
                reason = str(error)
        log.info("generate() keeps transformers' cache: %s", reason)
        return None

    def runner(self, function: Callable[[], None], failed: Callable[[], None]) -> Runner:
        """What runs a step: a CUDA graph of it wherever that can be, see `sessions.MakeRunner`."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model that decodes is gone")
        device = model.device
        if not self.graphs or device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return Direct(function)
        return Recorded(function, CudaGraphs(device), failed)


def _padded_behind_a_token(mask: Any) -> bool:
    """Whether a row of a padding mask, [rows, columns], hides a column behind one that it shows."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask[:, :-1].bool() & ~mask[:, 1:].bool()).any())


class _Request:
    """One call of `generate()`."""

    def __init__(self, model: Any, decoder: Decoder):
        self.model, self.decoder = model, decoder
        self.borrowed: SparseCache | None = None

    def prepare_cache(
        self, original: Callable[..., Any], config: Any, model_kwargs: dict[str, Any], mode: Any, rows: int, tokens: int
    ) -> None:
        """As `GenerationMixin._prepare_cache_for_generation`."""
        if mode not in _OURS and (bypass := regional.bypass_of(self.model)) is not None:
            bypass.refuse_loop(f"it decodes by {str(mode.value).replace('_', ' ')}")
        sequences = rows * (config.num_return_sequences or 1)
        self.borrowed = self.decoder.cache_for(self.model, config, model_kwargs, mode, sequences, tokens + 1)
        if self.borrowed is None:
            original(self.model, config, model_kwargs, mode, rows, tokens)
        else:
            model_kwargs[compat.CACHE_NAME] = self.borrowed

    def sample(self, original: Callable[..., Any], input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin._sample`."""
        config = inspect.signature(compat.stock("_sample")).bind(self.model, input_ids, *args, **kwargs).arguments["generation_config"]
        with narrowing.reading_in_parts(config.prefill_chunk_size is not None):
            return self._sample(original, input_ids, *args, **kwargs)

    def _sample(self, original: Callable[..., Any], input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(compat.stock("_sample")).bind(self.model, input_ids, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        config, model_kwargs, cache = given["generation_config"], given["model_kwargs"], given["model_kwargs"].get(compat.CACHE_NAME)
        bypass = regional.bypass_of(self.model)
        reason = call.refusal(self.model, config, model_kwargs) or step_caches.refusal(cache, self.model)
        if not reason and given["synced_gpus"]:
            reason = "several processes decode in step"
        if not reason and (input_ids.dim() != 2 or input_ids.device != self.model.device):
            reason = "the tokens are more than one of each row, or lie on another device"
        if not reason and given["stopping_criteria"].max_length is None:
            reason = "no length is set"
        if reason:
            log.info("generate() runs transformers' loop because %s", reason)
            if bypass is not None:
                bypass.refuse_loop(reason)
            return original(self.model, input_ids, *args, **kwargs)
        users = cache is not self.borrowed and getattr(cache, "_is_user_defined", False)
        make_runner = self.decoder.runner
        if getattr(cache, "offloader", None) is not None:
            log.info("generate() decodes without a CUDA graph: keys and values come from the host's memory, layer by layer")
            make_runner = lambda function, failed: Direct(function)
        elif why := hooked(self.model):
            log.info("generate() decodes without a CUDA graph, which would not call them: %s", why)
            make_runner = lambda function, failed: Direct(function)
        names = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "streamer", "model_kwargs")
        return loop.decode(
            self.model,
            call.Call(**{name: given[name] for name in names}),
            private=not users and not config.return_dict_in_generate,
            late=input_ids.device.type == "cuda",
            make_runner=make_runner,
            sessions=self.decoder.sessions.setdefault(cache, Sessions()),
            shown=self.decoder.shown,
            bypass=bypass,
        )

    def finish(self, alone: bool) -> None:
        """After the call: hands the borrowed cache back. alone: the call ended well, and its caller did not get the cache."""
        cache = self.borrowed
        if cache is None:
            return
        recorded = cache in self.decoder.sessions and self.decoder.sessions[cache].by_key
        if alone and recorded and not regional.shares_prompts(self.model) and not torch.is_inference_mode_enabled():
            self.decoder.caches.give_back(cache)


_decoders: weakref.WeakKeyDictionary[Any, Decoder] = weakref.WeakKeyDictionary()
_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("sparsify_request", default=None)


def install(model: Any, *, graphs: bool = True, shown: bool = True) -> str:
    """Makes `model.generate()` decode with our loop, on this instance.

    Args:
        graphs, shown: as `Decoder` takes them.

    Returns:
        why that is not done; empty where it is.

    Raises:
        UnsupportedError: it is not, and tokens are to bypass layers, under `strict`.
    """
    reason = _install(model, graphs, shown)
    if reason and (bypass := regional.bypass_of(model)) is not None:
        bypass.refuse_loop(reason)
    return reason


def _install(model: Any, graphs: bool, shown: bool) -> str:
    kind = type(model)
    if not issubclass(kind, GenerationMixin) or not _is_stock(kind, "generate"):
        return "the model's generate() is not transformers' own"
    for name in ("_sample", "_prepare_cache_for_generation"):
        if not _is_stock(kind, name) and not hasattr(getattr(kind, name), "passes_on"):
            return f"the model has its own {name}"
    _pass_on(kind, "_sample", lambda request, original, *args, **kwargs: request.sample(original, *args, **kwargs))
    _pass_on(kind, "_prepare_cache_for_generation", lambda request, original, *args: request.prepare_cache(original, *args))
    _decoders[model] = Decoder(model, graphs=graphs, shown=shown)
    model.generate = types.MethodType(generate, model)
    return ""


def _is_stock(kind: type, name: str) -> bool:
    return getattr(kind, name) is compat.stock(name)


def _pass_on(kind: type, name: str, ours: Callable[..., Any]) -> None:
    """Gives a class a method that calls `ours` within a request for the very instance, and the inherited one otherwise."""
    inherited = getattr(kind, name)
    if hasattr(inherited, "passes_on"):
        return

    @functools.wraps(inherited)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = _request.get()
        if request is None or request.model is not self:
            return inherited(self, *args, **kwargs)
        return ours(request, inherited, *args, **kwargs)

    vars(method)["passes_on"] = True
    setattr(kind, name, method)


@functools.wraps(compat.stock("generate"))
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    original, decoder = type(self).generate, _decoders.get(self)
    given = inspect.signature(original).bind_partial(self, *args, **kwargs).arguments
    if decoder is None or given.get("custom_generate") is not None:  # a copy of the model, or a loop of the user's
        if (bypass := regional.bypass_of(self)) is not None:
            bypass.refuse_loop("it is a copy of the model" if decoder is None else "custom_generate is given")
        token = _request.set(None)
        try:
            return original(self, *args, **kwargs)
        finally:
            _request.reset(token)
    request = _Request(self, decoder)
    for shard in filter(None, (shards.find(self.parameters()), regional.shares_prompts(self))):
        agreement.agree(shard.group, _facts(self, given), where="generate()")
    token = _request.set(request)
    ended = False
    try:
        _say_prompt(given)
        chooser = new_prompt.asked(self)
        result = original(self, *args, **kwargs) if chooser is None else new_prompt.generate(chooser, original, self, given)
        ended = isinstance(result, torch.Tensor)
    finally:
        _forget_past(given)
        _request.reset(token)
        request.finish(ended)
    return result


def _say_prompt(given: dict[str, Any]) -> None:
    """Before a call: how long the text is behind which transformers may put drafts, for the user's cache."""
    named = {**given, **given.get("kwargs", {})}
    tokens = named.get("inputs", named.get("input_ids"))
    for cache in _own_caches(given):
        for layer in cache.layers:
            layer.before_drafts = tokens.shape[1] if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 else None


def _forget_past(given: dict[str, Any]) -> None:
    """After a call: what transformers and `_say_prompt` said of drafts does not hold for later calls over the user's cache."""
    for cache in _own_caches(given):
        for layer in cache.layers:
            layer.record_past, layer.before_drafts = False, None


def _own_caches(given: dict[str, Any]) -> list[SparseCache]:
    return [cache for cache in {**given, **given.get("kwargs", {})}.values() if isinstance(cache, SparseCache)]


def _facts(model: Any, given: dict[str, Any]) -> dict[str, str]:
    """What processes that decode together must have in common, for a call's arguments by name."""
    given = dict(given) | given.get("kwargs", {})
    inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    config = given.get("generation_config") or model.generation_config
    facts = {name: f"{tuple(value.shape)} {agreement.digest(value)}" for name, value in inputs.items()}
    facts["settings"] = agreement.digest([sorted(plain.items()), config.to_dict()])
    if plain.get("do_sample", config.do_sample):
        state = torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.get_rng_state()
        facts["the random generator's state"] = agreement.digest(state)
    return facts
