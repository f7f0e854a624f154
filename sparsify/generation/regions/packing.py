"""Packs the tokens of a padded batch into fewer rows while the layers run, and hands padded rows to everything else.

A method of the kind `batch` says whether. Here is what lets layers follow: rows of the residual stream, rotary tables, positions and masks
in packed rows, and why a batch is not packed. Caches are filled as the padded batch would fill them, so that later calls go on as ever.

That layers compute each token from its own text alone is run before it is relied on: over a small random batch, padded and packed. A single
layer that looked at padding would find other numbers there, so that all kinds of layers are asked before the first one runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function

from sparsify import pipeline
from sparsify.costs.sizes import AttentionSizes
from sparsify.distributed import sequence
from sparsify.errors import UnsupportedError
from sparsify.generation import compat
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.regions import bins, claims, masks, prompts, telling
from sparsify.generation.regions.caches import CACHES
from sparsify.generation.regions.layers import Layer
from sparsify.generation.regions.masks import PostponedMask, Recipe
from sparsify.generation.regions.packed import Layout, PaddedRows
from sparsify.matching.padded import PaddedSite, count_matrices, sizes
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision
from sparsify.planning.method import Context, Pass, Proposal, Refusal
from sparsify.planning.registry import discover
from sparsify.planning.saved_plan import SavedPlan

log = logging.getLogger(__name__)

# set around a call that must be packed, or fail
_required: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_packing_required", default=False)

# what a claim about a layer is run over: columns of the longer of two texts, draws (experts may change between equal scores)
_COLUMNS, _DRAWS = 12, 3
_MOST_ANSWERS = 256  # shapes that a method's answer is remembered for


@contextlib.contextmanager
def required() -> Generator[None]:
    """Within the block padded batches are packed, whatever the configuration says; one that cannot be is an error."""
    token = _required.set(True)
    try:
        yield
    finally:
        _required.reset(token)


def asked(config: Config, saved: SavedPlan | None, path: str) -> Pass | None:
    """The method of the kind `batch` that plan file or configuration asks for, None without one. path: of the list of layers."""
    methods = {name: method for name, method in discover().items() if "batch" in method.kinds}
    for decision in () if saved is None else saved.plan.rewritten:
        if decision.kind == "batch" and decision.method in methods:
            return methods[decision.method](**decision.options)
    chosen = [methods[name](**options) for name, options in config.for_layer(path, None, methods)]
    return next((method for method in chosen if not (config.exact and method.lossy)), None)


class Packing:
    """How a model packs its padded batches.

    Args:
        model: in transformers' form.
        layers: its decoder or encoder layers.
        kinds: for every layer the number of its kind.
        part: of the model that this process has.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        kinds: Sequence[int],
        config: Config,
        saved: SavedPlan | None,
        part: pipeline.Part = pipeline.WHOLE,
    ):
        self.alone = part.heads is None
        self.layers, self.kinds, self.config = layers, kinds, config
        self.path = layers[0].path.rpartition(".")[0]
        self.method = asked(config, saved, self.path)
        self.text = cast(Any, model.config).get_text_config(decoder=True)
        self.matrices = count_matrices([[(p.shape[1], p.shape[0]) for p in layer.module.parameters() if p.dim() == 2] for layer in layers])
        self._claims: dict[int, str] = {}  # why layers of a kind cannot be packed, empty where they can
        self._obstacle = ""  # seen in an earlier call, behind its first layer
        self._told: set[Any] = set()
        self._answers: dict[Any, Proposal | Refusal] = {}

    def begin(self, hidden: Tensor, given: Mapping[str, Any], shows_rows: bool, narrowed: bool) -> PackedCall | None:
        """Called before the first layer of a call runs, with its arguments. None where the call is not packed.

        Args:
            shows_rows: the caller gets what each layer gave.
            narrowed: some of the call's tokens go on alone behind a layer.

        Raises:
            UnsupportedError: it cannot be, and must.
        """
        method = self._method()
        mask, columns = given.get("attention_mask"), hidden.shape[1]
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if method is None or columns == 1 or hidden.is_meta or (cache is not None and not prompts.is_empty(cache)):
            return None
        if mask is None or (padding := _padding(mask)) is None:
            return None
        if not is_mask(mask, columns):
            return self.refuse(method, "the mask is a tensor of its own, whose meaning is not known")
        if (is_token := prompts.find_tokens(padding, columns)) is None:
            return None
        if reason := self._obstacle or self._trouble(hidden, given, is_token, narrowed):
            return self.refuse(method, reason)
        starts, lengths = _runs(is_token)
        if starts is None:
            return self.refuse(method, "a row's tokens do not stand side by side")
        heads_dim = _heads(self.text, hidden.shape[2])
        products = sum(inputs * outputs * count for (inputs, outputs), count in self.matrices) / len(self.layers)
        rows = bins.pack(tuple(lengths), max(1.0, products / (heads_dim[0] * heads_dim[2])))
        if not rows:
            return None
        site = self._site(hidden, lengths, rows, heads_dim, cache is not None)
        context = pipeline.context_of_call(hidden.device, self.config)
        answer = self._asked(method, site, context)
        if not isinstance(answer, Proposal):
            self._record(site, None, str(answer), answer.reason)
            return None
        if reason := self._claimed(hidden, given):
            return self.refuse(method, reason)
        decision = self._record(site, method, "", answer.note)
        if decision is not None:
            decision.options, decision.seconds = method.options(), float(answer.seconds)
            decision.dense_seconds = site.layer_seconds(context.device, site.batch, site.columns)
        return PackedCall(self, method, Layout.of(is_token, starts, lengths, rows), mask, shows_rows)

    def _asked(self, method: Any, site: PaddedSite, context: Context) -> Proposal | Refusal:
        """What the method answers, asked once for each shape: here costs decide, and take milliseconds."""
        key = method, site, context
        answer = self._answers.get(key)
        if answer is None:
            answer = method.propose(site, context)
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers.clear()
            self._answers[key] = answer  # threads may ask at once, and answer alike
        return answer

    def _method(self) -> Any:
        if not _required.get():
            return self.method
        return discover()["unpad"].model_validate({"when": "always"})

    def _trouble(self, hidden: Tensor, given: Mapping[str, Any], is_token: Tensor, narrowed: bool) -> str:
        if torch.is_grad_enabled() and hidden.requires_grad:
            return "gradients are required"
        if sequence.under_way() is not None or not self.alone:
            return "text or layers are divided among processes"
        if narrowed:
            return "some tokens go on alone behind a layer"
        first = self.layers[0].number
        return next((why for name, value in given.items() if (why := trouble(name, value, is_token, first))), "")

    def _claimed(self, hidden: Tensor, given: Mapping[str, Any]) -> str:
        """Why the layers cannot be packed; empty where they can. Run once for each kind, with the first layer's arguments."""
        for layer in self.layers:
            kind = self.kinds[layer.number]
            if kind not in self._claims:
                why = _run_claim(layer, hidden, given)
                self._claims[kind] = f"{layer.path}: {why}" if why else ""
        return next(filter(None, self._claims.values()), "")

    def refuse(self, method: Any, reason: str) -> None:
        """Says why a batch is not packed, once for each reason.

        Raises:
            UnsupportedError: it must be, or under `strict` is asked for in any case.
        """
        if _required.get() or (self.config.strict and method.when == "always"):
            raise UnsupportedError(reason, where="packing a padded batch")
        log.info("%s: %s", method.name, reason)
        self._record(None, None, str(method.refuse(reason)), "no method acts")

    def _record(self, site: PaddedSite | None, method: Any, refusal: str, reason: str) -> Decision | None:
        """The decision as plans show it, once for each; None where it was told already."""
        key = reason, refusal, tuple(sizes(site).items())
        if not telling.is_new(self._told, key):
            return None
        decision = Decision(self.path, None, "prefill", sizes(site), "", method and method.name, reason=reason, kind="batch")
        decision.refusals = [refusal] if refusal else []
        telling.tell(decision)
        return decision

    def _site(
        self, hidden: Tensor, lengths: Sequence[int], rows: Sequence[Sequence[int]], heads: tuple[int, int, int], cached: bool
    ) -> PaddedSite:
        batch, columns, width = hidden.shape
        attention = AttentionSizes(batch, heads[0], heads[1], columns, columns, heads[2], heads[2], hidden.dtype)
        length = max(sum(lengths[one] for one in row) for row in rows)
        return PaddedSite(
            self.path, len(self.layers), batch, columns, sum(lengths), len(rows), length, attention, width, self.matrices, cached
        )

    def stop(self, layer: Layer, reason: str) -> UnsupportedError:
        """Batches are not packed any more; the error of a call that is."""
        self._obstacle = f"{layer.path}: {reason}"
        hint = "call again: batches are not packed from now on; leave `unpad` out, or reset a cache that the call was given"
        return UnsupportedError(self._obstacle, where="packing a padded batch", hint=hint)


class PackedCall:
    """A call whose tokens are packed: `enter` and `leave` stand around each layer.

    layout: where tokens lie.
    """

    def __init__(self, owner: Packing, method: Any, layout: Layout, mask: Any, shows_rows: bool):
        self.owner, self.method, self.layout, self.shows_rows = owner, method, layout, shows_rows
        self._masks = {id(mask): mask}  # that hide the layout's padding; comparing one waits for the device
        self._packed: dict[int, tuple[Any, Any]] = {}

    def enter(self, layer: Layer, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The layer's arguments, those that are given by position and the others, over packed rows; None where the layer runs over the
        padded batch, whose padding it hides.

        Raises:
            UnsupportedError: it may see padding, where earlier layers computed nothing.
        """
        hidden, is_token = args[0] if args else given.get("hidden_states"), self.layout.is_token
        rest = {**dict(zip(layer.arguments[1:], args[1:], strict=False)), **given}
        rest.pop("hidden_states", None)
        mask = rest.get("attention_mask")
        if id(mask) not in self._masks:
            if why := mask_trouble(mask, is_token):
                raise self.owner.stop(layer, why)
            self._masks[id(mask)] = mask
        reason = next((why for name, value in rest.items() if (why := trouble(name, value, is_token, layer.number))), "")
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != is_token.shape or len(args) > len(layer.arguments):
            reason = "its layers are called in a form that is not known"
        if reason or not isinstance(hidden, Tensor):
            return self.owner.refuse(self.method, f"{layer.path}: {reason}")
        rows = hidden.rows() if isinstance(hidden, PaddedRows) else self.layout.pack(hidden)
        rest = {name: self._pack(name, value) for name, value in rest.items()}
        return ((rows,), rest) if args else ((), {"hidden_states": rows, **rest})

    def leave(self, layer: Layer, result: Any) -> Any:
        """The layer's result over packed rows, padded; without memory between two layers."""
        hidden = result[0] if type(result) is tuple else result
        rows = PaddedRows(hidden, self.layout)
        last = layer.number + 1 == len(self.owner.layers)
        hooked = compat.without_recorders(layer.module._forward_hooks)
        padded = rows.make() if last or self.shows_rows or hooked else rows
        return (padded, *result[1:]) if type(result) is tuple else padded

    def give_up(self, layer: Layer, reason: str) -> None:
        """The layer runs over the padded batch, since its region cannot be captured over packed rows."""
        self.owner.refuse(self.method, f"{layer.path}: {reason}")

    def _pack(self, name: str, value: Any) -> Any:
        found = self._packed.get(id(value))
        if found is None:  # kept beside the value, so that no other object takes its id
            found = self._packed[id(value)] = (value, _pack_argument(name, value, self.layout))
        return found[1]


def mask_trouble(mask: Any, is_token: Tensor) -> str:
    """Why a layer's mask may show padding; empty where it does not."""
    if not is_mask(mask, is_token.shape[1]):
        return "the mask is a tensor of its own, whose meaning is not known" if mask is not None else "it is given no mask"
    same = torch.equal(_padding(mask) != 0, is_token)
    return "" if same else "its mask has another padding than the first layer's"


def trouble(name: str, value: Any, is_token: Tensor, number: int) -> str:
    """Why an argument of layer `number` cannot follow its tokens; empty where it can."""
    columns = is_token.shape[1]
    if name in CACHES and value is not None:
        return _cache_trouble(value.layers[number])
    if name == "attention_mask":
        return _form_trouble(value, columns)
    if name == "position_embeddings":
        return "" if value is None or prompts.is_rotary(value, columns) else "its tables are not rotary ones, one angle for each token"
    if name == "position_ids":
        fits = value is None or (isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == columns)
        return "" if fits else f"it is given {name} in a form that is not known"
    if prompts.holds_tensors(value):
        return f"it is given {name}, of which it is not known what belongs to which token"
    return ""


def is_mask(mask: Any, columns: int) -> bool:
    """Whether a mask tells which columns hold tokens."""
    padding = _padding(mask)
    return isinstance(padding, Tensor) and padding.dim() == 2 and padding.shape[1] == columns


def _padding(mask: Any) -> Any:
    return mask.recipe.call.get("attention_mask") if isinstance(mask, PostponedMask) else mask


def _pack_argument(name: str, value: Any, layout: Layout) -> Any:
    """A layer's argument over packed rows."""
    if isinstance(value, PostponedMask):
        return _pack_mask(value, layout)
    if name == "attention_mask":
        return None  # over a SparseCache, which is told by what its layer gives attention
    if name == "position_embeddings" and value is not None:
        return tuple(map(layout.pack, value))
    if name == "position_ids" and value is not None:
        return layout.pack(value)
    return value


def _pack_mask(mask: PostponedMask, layout: Layout) -> PostponedMask:
    call = {**mask.recipe.call, "batch_size": layout.rows, "q_length": layout.length, "kv_length": layout.length}
    call |= {"q_offset": 0, "kv_offset": 0, "attention_mask": None, "allow_is_causal_skip": False}
    recipe = Recipe(mask.recipe.function, call, layout.documents)
    return PostponedMask(recipe, (layout.rows, 1, layout.length, layout.length), mask.dtype, mask.device)


def _form_trouble(mask: Any, columns: int) -> str:
    if not isinstance(mask, PostponedMask):
        return ""
    call = mask.recipe.call
    if not _counts_differences(call.get("mask_function")):
        return "its mask says more than causality, a window and padding"
    square = call["q_length"] == columns and call["kv_length"] >= columns and call.get("kv_offset", 0) == 0
    return "" if square else "its mask is one of another length"


def _counts_differences(condition: Any) -> bool:
    """Whether a condition on indices depends on nothing but the distance between query and key, so that it holds in any row."""
    code = getattr(condition, "__code__", None)
    if code is _AND:
        (cell,) = condition.__closure__
        return all(map(_counts_differences, cell.cell_contents))
    return code in _DISTANCES


_AND: Any = cast(Any, and_masks(causal_mask_function)).__code__
_DISTANCES: set[Any] = {
    cast(Any, function).__code__
    for function in (
        causal_mask_function,
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_overlay(1),
        masking_utils.sliding_window_bidirectional_overlay(1),
    )
}


def _cache_trouble(layer: Any) -> str:
    if isinstance(layer, SparseLayer):
        if layer.shard is not None:
            return "the text is divided among processes"
        if layer.inverse_frequencies is not None:
            return "the cache turns sinks by places inside it"
        if layer.offloader is not None:
            return "keys and values lie in the host's memory"
        if layer.record_past:
            return "tokens of the call may be taken back"
    return ""


def _runs(is_token: Tensor) -> tuple[list[int] | None, list[int]]:
    """First token and number of tokens of each row; None for the first where a row's tokens do not stand side by side."""
    at = torch.arange(is_token.shape[1], device=is_token.device)
    counts = is_token.sum(-1)
    first = at.masked_fill(~is_token, is_token.shape[1]).amin(-1).minimum(at[-1])
    last = at.masked_fill(~is_token, -1).amax(-1)
    starts, lengths, ends = torch.stack((first, counts, last)).tolist()
    alone = all(end - start + 1 == length or not length for start, length, end in zip(starts, lengths, ends, strict=True))
    return (starts if alone else None), lengths


def _heads(text: Any, width: int) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim of a text configuration, for costs; one head of all elements where it names none."""
    found = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    heads, kv_heads, head_dim = (number if isinstance(number, int) and number else None for number in found)
    return heads or 1, kv_heads or heads or 1, head_dim or width // (heads or 1)


# -- the claim that a layer computes each token from its own text alone ---------------------------------------------------------------


@torch.no_grad()
def _run_claim(layer: Layer, hidden: Tensor, given: Mapping[str, Any]) -> str:
    """Runs a layer over two short texts, padded and packed. Returns why the claim does not hold; empty where it does."""
    columns, shorter = _COLUMNS, _COLUMNS // 2
    is_token = torch.ones(2, columns, dtype=torch.bool, device=hidden.device)
    is_token[1, : columns - shorter] = False
    layout = Layout.of(is_token, (0, columns - shorter), (columns, shorter), ((1, 0),))
    small = {name: _small(name, value, layer, is_token) for name, value in given.items()}
    packed = {name: _pack_argument(name, value, layout) for name, value in small.items()}
    try:
        found = [_differs(layer, layout, hidden, small, packed, seed) for seed in range(_DRAWS)]
    except Exception as error:
        log.debug("%s is not packed", layer.path, exc_info=error)
        return f"it cannot be run over packed rows ({type(error).__name__})"
    return "" if not all(found) else found[0]


def _differs(layer: Layer, layout: Layout, hidden: Tensor, small: dict[str, Any], packed: dict[str, Any], seed: int) -> str:
    shape = layout.batch, layout.columns, hidden.shape[2]
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(hidden)
    forward: Callable[..., Any] = layer.module.forward
    results = []
    for stream, arguments in ((rows, small), (layout.pack(rows), packed)):
        result = forward(stream, **{name: masks.real(value) for name, value in arguments.items()})
        if type(result) is tuple and any(map(prompts.holds_tensors, result[1:])):
            return "it gives more than the residual stream"
        results.append(result[0] if type(result) is tuple else result)
    want, found = (one[layout.is_token] for one in (results[0], layout.unpack(results[1])))
    alike = claims.alike(rows[layout.is_token], want, found)
    return "" if alike else "what it computes for a token depends on more than the token's text"


def _small(name: str, value: Any, layer: Layer, is_token: Tensor) -> Any:
    """A layer's argument over the small batch."""
    batch, columns = is_token.shape
    if name in CACHES:
        return None
    if name == "attention_mask":
        if isinstance(value, PostponedMask):
            recipe, dtype = value.recipe, value.dtype
            padding = is_token.to(recipe.call["attention_mask"].dtype)
        else:  # over a SparseCache
            recipe, dtype, padding = _plain_recipe(layer, is_token), torch.float32, is_token
        call = {**recipe.call, "batch_size": batch, "q_length": columns, "kv_length": columns, "q_offset": 0, "kv_offset": 0}
        call |= {"attention_mask": padding, "allow_is_causal_skip": False}
        return PostponedMask(Recipe(recipe.function, call), (batch, 1, columns, columns), dtype, is_token.device)
    if name == "position_embeddings" and value is not None:
        return tuple(_first(table, columns).expand(batch, -1, -1) for table in value)
    if name == "position_ids" and value is not None:
        return _first(value, columns).expand(batch, -1)
    return value


def _first(rows: Tensor, columns: int) -> Tensor:
    """The first columns of the first row, again from the start where there are fewer."""
    return rows[:1, torch.arange(columns, device=rows.device) % rows.shape[1]]


def _plain_recipe(layer: Layer, is_token: Tensor) -> Recipe:
    """How the model's own attention takes a causal mask."""
    config = next(vars(part)["config"] for part in layer.module.modules() if "config" in vars(part))
    base = {ours: own for own, ours in cache_attention.NAMES.items()}.get(config._attn_implementation, "sdpa")
    function = ALL_MASK_ATTENTION_FUNCTIONS["eager" if base == "eager" else "sdpa"]
    return Recipe(function, {"mask_function": causal_mask_function, "device": is_token.device})
