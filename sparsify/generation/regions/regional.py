"""Compiles each kind of decoder layer of a model once and calls the result for all layers of that kind.

A call that this cannot serve is captured whole, as `model.compile(backend="sparsify")` would do it. Mostly that shows before the first
layer runs, and the call starts again. Where it shows later, the layer at hand runs uncompiled in this call, and later calls are captured
whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import logging
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from sparsify import pipeline, progress
from sparsify.distributed import agreement, sequence
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.regions import bypass, caches, images, layers, left_out, long_rows, masks, narrowing, tensor_parallel, tokens
from sparsify.generation.regions.caches import LayerView
from sparsify.generation.regions.context_parallel import DividedCalls
from sparsify.generation.regions.layers import Layer, NotShared
from sparsify.generation.regions.long_rows import LongRows
from sparsify.generation.regions.masks import PostponedMask
from sparsify.generation.regions.narrowing import Narrowed, Narrowing
from sparsify.generation.regions.packed import Layout, PaddedRows
from sparsify.generation.regions.packing import PackedCall, Packing
from sparsify.generation.regions.towers import Towers, asked, texts
from sparsify.graph import compat as torch_compat
from sparsify.ops.head_numbers import head_numbers
from sparsify.pipeline import WHOLE, Part
from sparsify.planning import unmatched
from sparsify.planning.choose import named_methods
from sparsify.planning.config.config import Config
from sparsify.planning.saved_plan import load_saved_plan

log = logging.getLogger(__name__)

# more kinds than this take as long to compile as the whole model
MOST_KINDS = 8

_SEEN = 4096  # sizes of calls that a region remembers
_numbers = itertools.count()
_active: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("sparsify_regions", default=None)


class WholeModel:
    """A model's call, captured as one graph; plans made in it tell the reason."""

    def __init__(self, call: Callable[..., Any], reason: str):
        self.call, self.reason = call, reason
        log.warning("captured whole, not layer by layer: %s", reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plans = pipeline.collector.get()
        before = 0 if plans is None else len(plans)
        result = self.call(*args, **kwargs)
        for plan in (plans or ())[before:]:
            plan.capture = f"whole: {self.reason}"
        return result


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
        self.layers = layers.find_layers(model)
        self.kinds = _kinds(self.layers, config)
        self.towers = Towers(model, self.layers, config)
        self._by_module = {id(layer.module): layer for layer in (*self.layers, *self.towers.layers)}
        self._saved = load_saved_plan(config.plan)
        chosen = narrowing.all_asked(config, self._saved, [layer.path for layer in self.layers])
        self.part = Part(tensor_parallel.of_heads(self.layers[0].module), "" if text is None else text.group)
        if self.part.heads is not None:
            tensor_parallel.prepare_sums(self.part.heads, next(model.parameters()).device, config)
        self.narrowing = Narrowing(model, self.layers, config, chosen[0], chosen[1:], self.part.heads) if chosen else None
        self.packing = Packing(model, self.layers, self.kinds, config, self._saved, self.part)
        skipping = bypass.asked(config, self._saved, self.layers[0].path.rpartition(".")[0])
        trouble = lambda: self.reason or self._watch.trouble()
        self.bypass = None if skipping is None else bypass.Bypass(model, self.layers, config, skipping, text is not None, trouble)
        self._head_numbers: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._watch = layers.Watch(self.layers)
        self.divided = None if text is None else DividedCalls(model, text)
        self.tokens = None
        if self.narrowing is None and self.bypass is None and text is None and self.part == WHOLE and tokens.pays(self.layers, config):
            self.tokens = tokens.Tokens(model, self.layers, lambda function: _Region(self, (), function, dynamic=None))
        self.reason = ""  # why no call is served by regions any more
        self._regions: dict[Any, _Region] = {}
        self._lock = threading.RLock()
        self._wholes: dict[str, WholeModel] = {}
        attention = next(part for part in self.layers[0].module.modules() if hasattr(part, "config"))
        cache_attention.use_sparse_attention(attention.config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # someone else captures the model within something larger
            return self.model._call_impl(*args, **kwargs)
        if any(caches.keeps_past(kwargs.get(name)) for name in caches.CACHES):
            log.info("drafts over a cache that evicts run uncompiled")
            return self.model._call_impl(*args, **kwargs)
        try:
            if self.divided is not None:
                return self.divided(self._as_alone, args, kwargs)
            return self._as_alone(*args, **kwargs)
        except NotShared as why:
            reason, lasting = str(why), why.lasting
        except RuntimeError as error:
            if self.part == WHOLE or not agreement.is_loss(error):
                raise
            raise agreement.stopped(error, type(self.model).__name__) from error
        if self.divided is not None:
            raise UnsupportedError(f"a prompt is divided among processes, and layers share no code: {reason}", where="context parallelism")
        if reason not in self._wholes:
            self._wholes[reason] = WholeModel(self.whole, reason)
        given = (*(kwargs.get(name) for name in ("input_ids", "inputs_embeds")), *args, *kwargs.values())  # a mask is as long as the text
        tokens = next((value.shape[1] for value in given if isinstance(value, Tensor) and value.dim() > 1), 1)
        masked = kwargs.get("attention_mask") is not None
        for cache in (value for name, value in kwargs.items() if name in caches.CACHES):
            caches.settle(cache, tokens)
            for held in getattr(cache, "layers", ()):
                left_out.check_whole(held, tokens, masked)
        result = self._wholes[reason](*args, **kwargs)
        if lasting:  # and not the caller's mistake, which would have been raised
            self.reason = reason
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
        call = _Call(self, lambda shape: images.find(self.model, args, kwargs, shape))
        call.shows_rows = self._shows_rows(kwargs)
        entered = _active.set(call), masks.postponing.set(True)
        try:
            result = self.model._call_impl(*args, **kwargs)
        except BaseException:
            if call.narrowed is not None and not call.ran:
                call.narrowed.take_back()
            raise
        finally:
            masks.postponing.reset(entered[1])
            _active.reset(entered[0])
        if call.compiled and self.config.rules:
            unmatched.conclude(self.config, self.options)
        return result

    def _check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises NotShared with what speaks against regions before anything runs."""
        if self.reason:
            raise NotShared(self.reason)
        config = self.model.config
        for name in ("output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(config, name, False)):
                raise NotShared(f"{name} asks for what a layer computes inside")
        cache = next((value for name, value in kwargs.items() if name in caches.CACHES and value is not None), None)
        if cache is not None and (why := caches.trouble(cache, len(self.layers))):
            raise NotShared(why)
        if not any(isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == 1 for value in (*args, *kwargs.values())):
            self._watch.look_again()  # at prompts, which take long beside it
        if why := self._watch.trouble():
            raise NotShared(why)
        if self._watch.divides and torch.is_grad_enabled():
            raise NotShared("gradients are enabled, and tensor parallelism divides the model")

    def layer(self, module: nn.Module) -> Layer | None:
        return self._by_module.get(id(module))

    def head_numbers(self, layer: Layer, device: torch.device) -> dict[str, Tensor]:
        """What a layer's region takes as operands of the plan, float32 [query_heads] by the site's path in the layer and the option."""
        key = layer.number, device
        if key not in self._head_numbers:
            found = {} if self._saved is None else self._saved.head_numbers(layer.path)
            if (heads := self.part.heads) is not None:
                found = {name: heads.own(values, len(values) // heads.size) for name, values in found.items()}
            self._head_numbers[key] = {f"{site} {option}": torch.tensor(values, device=device) for (site, option), values in found.items()}
        return self._head_numbers[key]

    def kind(self, layer: Layer) -> Any:
        """What layers have in common that one region can serve."""
        return self.towers.kind(layer) if layer.tower else self.kinds[layer.number]

    def region(self, key: Any, layer: Layer, part: str) -> _Region:
        """part: as `Narrowed.part` says."""
        with self._lock:
            found = self._regions.get(key)
            if found is None:
                alike = (one for one in (self.towers.layers if layer.tower else self.layers) if self.kind(one) == self.kind(layer))
                paths = tuple(one.path for one in alike if not part or self.narrowing is None or self.narrowing.place(one) == part)
                found = self._regions[key] = _Region(self, paths, dynamic=self.dynamic, fullgraph=not layer.tower)
        return found


class _Region:
    """One compiled function for all layers of a kind, in calls of one form; without paths for a whole model.

    Dynamo compiles a function twice where two threads ask for it at once, and its guards keep state while they are asked: until the graph
    runs, a region serves one thread after the other.
    """

    def __init__(
        self,
        owner: RegionalModel,
        paths: tuple[str, ...],
        function: Callable[..., Any] | None = None,
        dynamic: bool | None = True,
        fullgraph: bool = True,
    ):
        self.owner, self.paths = owner, paths
        shared = sequence.under_way()
        # a step after the prompt has a token that all processes have
        self.part = (
            Part(owner.part.heads) if shared is None else dataclasses.replace(owner.part, tokens=shared.regime, processes=shared.shard.size)
        )
        self.run = torch_compat.compile_in_threads(_private(function or _run), backend=self._backend, dynamic=dynamic, fullgraph=fullgraph)
        self._lock = threading.Lock()
        self._sizes: set[Any] = set()

    def __call__(self, sizes: Any, *arguments: Any) -> Any:
        """sizes: of what the call is over; those that ran once compile nothing."""
        self._lock.acquire()
        token = _waiting.set([self._lock])
        try:
            if sizes in self._sizes:
                return self.run(*arguments)
            with torch_compat.independent_sizes(), self._told():
                result = self.run(*arguments)
            if len(self._sizes) >= _SEEN:
                self._sizes.clear()
            self._sizes.add(sizes)
            return result
        finally:
            _release()
            _waiting.reset(token)

    def _told(self) -> contextlib.AbstractContextManager[Any]:
        """Tells of the first call, which compiles."""
        if self._sizes:
            return contextlib.nullcontext()
        what = f"layers ({len(self.paths)} alike)" if self.paths else "all layers, for tokens"
        return progress.task(f"compiling {what}", self.owner.config.progress)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if (call := _active.get()) is not None:
            call.compiled = True
        compiled = pipeline.compile_graph(gm, example_inputs, self.owner.config, self.owner.options, serves=self.paths, part=self.part)

        def graph(*inputs: Any) -> Any:
            _release()
            return compiled(*inputs)

        return graph


# the lock of the region that is called in this thread, until its graph runs
_waiting: contextvars.ContextVar[list[threading.Lock] | None] = contextvars.ContextVar("sparsify_waiting", default=None)


def _release() -> None:
    held = _waiting.get()
    if held:
        held.pop().release()


class _Held(nn.Module):
    """What a region is specialised on: Dynamo takes the numbers of a module for constants.

    cache: the copy of a cache layer.
    names: the arguments by which the decoder layer takes it.
    masks: how to make the masks, by argument.
    path: of the first layer that the region serves.
    """

    cache: Any
    names: tuple[str, ...]
    masks: dict[str, masks.Plan]
    path: str

    @classmethod
    def make(cls, cache: Any, names: tuple[str, ...], plans: dict[str, masks.Plan], path: str) -> _Held:
        held = object.__new__(cls)
        held.__dict__.update(_EMPTY_MODULE, cache=cache, names=names, masks=plans, path=path)
        return held


_EMPTY_MODULE = vars(nn.Module())


def _run(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held: _Held,
    state: dict[str, Any],
    padding: dict[str, Any],
    numbers: dict[str, Tensor],
    observed: dict[str, Tensor],
    packing: dict[str, Tensor],
) -> Any:
    """What a region is captured from: the masks, then the layer.

    state: what varies of the cache layer. padding: what varies of the masks, by name. numbers: of heads, see `RegionalModel.head_numbers`.
    observed: as `Narrowed.observation` gives it; where there is any, the result is a pair with what keys get of these queries' attention.
    packing: `Layout.operands` where the call's tokens are packed, else empty.
    """
    for name, values in numbers.items():
        site, option = name.split(" ")
        head_numbers(values, held.path + site, option)
    hidden = args[0] if args else kwargs["hidden_states"]
    given = dict(kwargs)
    if held.cache is not None:
        view = caches.view(held.cache, state, packing)
        for name in held.names:
            given[name] = view
    for name, plan in held.masks.items():
        given[name] = masks.build(plan, padding[name], hidden, None if packing else held.cache)
    if not observed:
        return layer.forward(*args, **given)
    found: list[Tensor] = []
    result = layer.forward(*args, **given, **{cache_attention.OBSERVED: (found, observed)})
    return result, found[0] if len(found) == 1 else None


def _private(function: types.FunctionType) -> types.FunctionType:
    """The same function with a code object of its own: what Dynamo compiled, and the sizes that it saw, lie with those."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


class _Call:
    """A call of the model that is under way.

    ran: whether a region has run, so that the call cannot start again elsewhere.
    compiled: whether a region was compiled in it.
    shows_rows: whether the caller gets what each layer gave, for all rows.
    narrowed: what lets some tokens go on alone; None where nothing does.
    packed: what packs a padded batch; None where nothing does.
    tower_trouble: why towers run as they are in this call; None before one was asked.

    Args:
        find_images: says which of its tokens stand for images.
    """

    def __init__(self, model: RegionalModel, find_images: narrowing.FindImages):
        self.model, self.find_images = model, find_images
        self.ran = self.compiled = self.shows_rows = False
        self.narrowed: Narrowed | None = None
        self.packed: PackedCall | None = None
        self.tower_trouble: str | None = None
        self._before: Any = None  # the result of the layer before

    def run(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, its own hooks around it."""
        module = layer.module
        if layer.number in bypass.bypassed() and not layer.tower:
            return bypass.handed_on(args[0] if args else kwargs["hidden_states"], self._before)
        if module._forward_pre_hooks or module._forward_hooks:
            args, kwargs = _made(args, kwargs)
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            elif (found := hook(module, args)) is not None:
                args = found if isinstance(found, tuple) else (found,)
        if layer.number == 0 and not layer.tower:
            self._begin(layer, args, kwargs)
        if self.narrowed is not None and not layer.tower:
            args, kwargs = self.narrowed.enter(layer, args, kwargs)
        if layer.tower:
            result = self._run_tower(layer, args, kwargs)
        else:
            result = self._run(layer, args, kwargs) if self.packed is None else self._run_packed(self.packed, layer, args, kwargs)
        for key, hook in module._forward_hooks.items():
            with_kwargs = key in module._forward_hooks_with_kwargs
            found = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
            result = result if found is None else found
        if layer.tower:
            return result
        if layer.number == 0 and self.model.bypass is not None:
            self.model.bypass.look_at_result(args[0] if args else kwargs["hidden_states"], result)
        self._before = result if self.narrowed is None else self.narrowed.leave(layer, result)
        return self._before

    def _begin(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds what narrows or packs the call that begins with this layer."""
        given = {**dict(zip(layer.arguments, args, strict=False)), **kwargs}
        hidden = args[0] if args else given.get("hidden_states")
        if type(hidden) is not Tensor or hidden.dim() != 3:
            return
        given = {name: value for name, value in given.items() if value is not hidden}
        if self.model.bypass is not None:
            self.model.bypass.look(hidden, given)
        if self.model.narrowing is not None:
            self.narrowed = self.model.narrowing.begin(hidden, given, self.shows_rows, self.find_images)
        self.packed = self.model.packing.begin(hidden, given, self.shows_rows, self.narrowed is not None)

    def _run_packed(self, packed: PackedCall, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, over packed rows where it can be."""
        if (entered := packed.enter(layer, args, kwargs)) is not None:
            try:
                return packed.leave(layer, self._through_region(layer, *entered, packed.layout))
            except NotShared as why:
                packed.give_up(layer, str(why))
        return self._run(layer, *_made(args, kwargs))

    def _run_tower(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a tower's layer, as it is where no region serves it."""
        towers = self.model.towers
        if self.tower_trouble is None:
            self.tower_trouble = towers.trouble()
        given = {**dict(zip(layer.arguments, args, strict=False)), **kwargs}
        if self.tower_trouble or not towers.serves(layer, given):
            return _uncompiled(layer.module, args, kwargs)
        ran = self.ran
        try:
            return self._through_region(layer, args, kwargs)
        except NotShared as why:
            towers.leave(layer, str(why))
            return _uncompiled(layer.module, args, kwargs)
        finally:
            self.ran = ran

    def _run(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._through_region(layer, args, kwargs)
        except NotShared as why:
            if not self.ran:
                raise
            result = _uncompiled(layer.module, args, kwargs)
            log.warning("%s runs as it is in this call: %s", layer.path, why)
            self.model.reason = self.model.reason or str(why)
            return result

    def _through_region(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | None = None) -> Any:
        """layout: where the call's tokens lie, if they are packed."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if type(hidden) is not Tensor or (hidden.dim() != 3 and not (layer.tower and hidden.dim() == 2)):
            raise NotShared("its layers are called in a form that is not known")
        batch, query_len = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.shape[0])
        kwargs = {**dict(zip(layer.arguments[1:], args[1:], strict=False)), **kwargs}
        if len(args) > len(layer.arguments):
            raise NotShared("its layers are called in a form that is not known")
        rest, args, cache, key_len = dict(kwargs), args[:1], None, 0
        shadow = layer.shadow.current()
        names = tuple(name for name in caches.CACHES if rest.get(name) is not None)
        for name in names:
            held_cache = rest.pop(name)
            if why := caches.trouble(held_cache, len(self.model.layers)):
                raise NotShared(why)
            cache = caches.layer_call(held_cache, layer.shadow.number, query_len if layout is None else layout.columns)
            key_len = cache.key_len
        if cache is not None and cache.key_len:
            rest = left_out.own_masks(rest, layer.arguments, cache.layer, hidden)
        postponed = {name: value for name, value in rest.items() if isinstance(value, PostponedMask)}
        rest = {name: value for name, value in rest.items() if name not in postponed}
        narrowed = None if layer.tower else self.narrowed
        observed = {} if narrowed is None else narrowed.observation(layer)
        part = "" if narrowed is None else narrowed.part(layer)
        held_by = left_out.as_held(cache.layer) if cache is not None and layout is None else None
        planned = {name: masks.plan(mask.recipe, hidden, held_by) for name, mask in postponed.items()}
        key = (
            self.model.kind(layer),
            names,
            tuple(map(_form, args)),
            tuple((name, _form(value)) for name, value in rest.items()),
            tuple((name, mask.recipe.form(), planned[name][0].form()) for name, mask in postponed.items()),
            cache and cache.kind(),
            (batch == 1, query_len == 1, hidden.dtype, hidden.device),
            layout and layout.batch == 1,
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hidden.requires_grad),
            part,
            0 if (shared := sequence.under_way()) is None else shared.regime,
        )
        region = self.model.region(key, layer, part)
        if cache is not None:
            cache.begin()
        try:
            held = _Held.make(cache and cache.copy, names, {name: plan for name, (plan, _) in planned.items()}, region.paths[0])
            padding = {name: varying for name, (_, varying) in planned.items()}
            state = cache.varying if cache else {}
            numbers = self.model.head_numbers(layer, hidden.device) if query_len > 1 and not layer.tower else {}
            packing = {} if layout is None else layout.operands()
            sizes = (batch, query_len, key_len, layout and layout.is_token.shape, texts(kwargs) if layer.tower else 0)
            result = region(sizes, shadow, args, rest, held, state, padding, numbers, observed, packing)
            if observed and narrowed is not None:
                result, narrowed.mass = result
        except TorchDynamoException as error:
            if isinstance(error, BackendCompilerFailed):
                raise
            if cache is not None:
                cache.undo()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            log.debug("%s cannot be a region", layer.path, exc_info=error)
            what = lines[0] if lines else type(error).__name__
            raise NotShared(f"a layer cannot be captured as one graph: {what}", lasting=True) from None
        self.ran = True
        if cache is None:
            return result
        cache.end()
        given_back = lambda value: cache.cache if isinstance(value, LayerView) else value
        return tuple(map(given_back, result)) if type(result) is tuple else given_back(result)


_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))


def _form(value: Any) -> Any:
    """What of an argument tells graphs apart, beside the sizes of tensors.

    Raises:
        NotShared: an object that layers may hand on to each other.
    """
    if type(value) in (Tensor, nn.Parameter):
        return value.dim(), value.dtype
    if isinstance(value, _SIMPLE):
        return value if isinstance(value, bool | str) else type(value)
    if type(value) in (tuple, list):
        return type(value), tuple(map(_form, value))
    raise NotShared(f"its layers are given a {type(value).__name__}")


def _uncompiled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer as it is; its hooks are the caller's."""
    return module.forward(*map(masks.real, args), **{name: masks.real(value) for name, value in kwargs.items()})


def _made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with packed rows as the padded batch."""
    made = lambda value: value.make() if isinstance(value, PaddedRows) else value
    return tuple(map(made, args)), {name: made(value) for name, value in kwargs.items()}


class Handover:
    """What a layer is called through: its region within a call of the model that it belongs to, else the layer itself."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            call = _active.get()
            if call is not None and (mine := call.model.layer(self.layer.module)) is not None:
                return call.run(mine, args, kwargs)
        return self.layer.module._call_impl(*args, **kwargs)


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


def _kinds(found: list[Layer], config: Config) -> list[int]:
    """For every layer the number of its kind: layers of one kind differ in their weights only, and rules and plan say the same of them."""
    saved = load_saved_plan(config.plan)
    known: dict[Any, int] = {}
    kinds = [known.setdefault((layers.signature(layer.module), asked(layer, config, saved)), len(known)) for layer in found]
    if len(known) > MOST_KINDS:
        raise NotShared(f"its {len(found)} layers are of {len(known)} kinds")
    return kinds


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
    for layer in (*regional.layers, *regional.towers.layers):
        layer.module._compiled_call_impl = Handover(layer)
    for module in long_rows.find_norms(model, regional.layers):
        module._compiled_call_impl = LongRows(module, config)
    model._compiled_call_impl = regional


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
