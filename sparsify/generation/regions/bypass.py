"""Lets generated tokens bypass layers, between two calls of regions.

A method of the kind `token` says which layers, by how many tokens were generated before. `generate()` counts them, runs each token within
`bypassing`, and notes in the cache what its layers were not given. In all other calls every layer runs, since nobody says there which
tokens are generated. A bypassed layer hands the residual stream on and stores nothing.

Within a generation no later token runs a layer that an earlier one bypassed, so that none misses a key. Later prompts do run it: over keys
that it holds, which equals a mask that hides the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from sparsify import pipeline
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import UnsupportedError
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.regions import caches, left_out, narrowing, prompts, telling
from sparsify.generation.regions.layers import Layer
from sparsify.matching.token import TokenSite, sizes
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision
from sparsify.planning.method import Proposal
from sparsify.planning.registry import discover
from sparsify.planning.saved_plan import SavedPlan

log = logging.getLogger(__name__)

_NONE = range(0)
_bypassed: contextvars.ContextVar[range] = contextvars.ContextVar("sparsify_bypassed", default=_NONE)


@dataclasses.dataclass
class Seen:
    """What the layers of one call showed.

    of_call: what speaks against bypassing them in what they are given; empty where nothing does, None before they were looked at.
    of_result: the same in what a layer gives back.
    """

    of_call: str | None = None
    of_result: str = ""


# of the generation whose prompt is being read here
_watched: contextvars.ContextVar[Seen | None] = contextvars.ContextVar("sparsify_bypass_watched", default=None)

# what a layer is given that says where its tokens stand; other tensors might tell more
_KNOWN = ("hidden_states", "attention_mask", "position_ids", "cache_position", "position_embeddings")


@contextlib.contextmanager
def bypassing(layers: range) -> Generator[None]:
    """Within the block these layers are bypassed by calls of one token of each row."""
    token = _bypassed.set(layers)
    try:
        yield
    finally:
        _bypassed.reset(token)


@contextlib.contextmanager
def watching() -> Generator[Seen]:
    """Gives what layers show within the block, where a generation's prompt is read."""
    seen = Seen()
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def bypassed() -> range:
    """Numbers of the layers that are bypassed here."""
    return _bypassed.get()


def asked(config: Config, saved: SavedPlan | None, path: str) -> Any:
    """The method of the kind `token` that plan file or configuration asks for, None without one. path: of the list of layers."""
    methods = {name: method for name, method in discover().items() if "token" in method.kinds}
    for decision in () if saved is None else saved.plan.rewritten:
        if decision.kind == "token" and decision.method in methods:
            return methods[decision.method](**decision.options)
    chosen = [methods[name](**options) for name, options in config.for_layer(path, None, methods)]
    return next((method for method in chosen if not (config.exact and method.lossy)), None)


class Bypass:
    """How a model's generated tokens bypass its layers.

    Args:
        model: in transformers' form.
        layers: its decoder layers.
        method: of the kind `token`.
        divided: whether prompts are divided among processes.
        whole: why calls of the model do not go through layers one by one, as it is now; empty where they do.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], config: Config, method: Any, divided: bool = False, whole: Callable[[], str] = str
    ):
        self.config, self.method, self.count, self._whole = config, method, len(layers), whole
        self.path = layers[0].path.rpartition(".")[0]
        self.text = cast(Any, model.config).get_text_config(decoder=True)
        self.matrices = tuple(tuple((p.shape[1], p.shape[0]) for p in layer.module.parameters() if p.dim() == 2) for layer in layers)
        self._end = method.bypassed(method.warmup + method.length, self.count)  # of the schedule
        self._structure = "prompts are divided among processes" if divided else narrowing.counting_places(self.text, self._end)
        self._of_token = Seen()  # of steps, which give layers the same every time; a recorded one shows nothing
        self._told: set[str] = set()
        self._warned: set[str] = set()

    def look(self, hidden: Tensor, given: Mapping[str, Any]) -> None:
        """Called before the first layer of a call runs, with its arguments: looks at prompts, at the first token, and at the first call
        of a generation.

        Raises:
            UnsupportedError: tokens behind it cannot bypass layers, under `strict`.
        """
        watched, alone = _watched.get(), hidden.shape[1] == 1
        seen = [one for one in (watched, self._of_token if alone else None) if one is not None]
        if alone and all(one.of_call is not None for one in seen):
            return
        strange = [name for name, value in given.items() if name not in _KNOWN and prompts.holds_tensors(value)]
        what = f"its layers are given {', '.join(strange)}, of which it is not known what belongs to which token"
        of_call = what if strange else ""
        for one in seen:
            one.of_call = of_call
        site = self._site(hidden)
        context = pipeline.context_of_call(hidden.device, self.config)
        answer = self.method.propose(site, context)
        reason = self._structure or of_call
        if not reason and not isinstance(answer, Proposal):
            reason = answer.reason
        if reason:
            self._refuse(reason, asked=self.method != self.method.keep_all())
            return
        if not context.costs:
            return
        device = context.device
        decision = Decision(
            self.path, None, "decode", sizes(site, len(self._end)), "", self.method.name, self.method.options(), kind="token"
        )
        decision.reason, decision.seconds = answer.note, float(answer.seconds)
        decision.dense_seconds = site.layer_seconds(device, range(self.count))
        self._tell(decision, device.describe())

    def look_at_result(self, hidden: Tensor, result: Any) -> None:
        """Called with what the first layer was given and gave: a bypassed layer hands the residual stream on and nothing else."""
        more = type(result) is tuple and any(one is not None for one in result[1:])
        for one in (_watched.get(), self._of_token if hidden.shape[1] == 1 else None):
            if one is not None:
                one.of_result = "its layers hand on more than the residual stream" if more else ""

    def serves(self, cache: Any, drafts: bool) -> bool:
        """Whether tokens of a generation over a cache may bypass layers, as far as that shows before its prompt is read.

        Args:
            drafts: tokens are drafted and verified several at once.

        Raises:
            UnsupportedError: they cannot, under `strict`.
        """
        if not self._end:
            return False
        reason = _trouble(cache) or caches.trouble(cache, self.count) or ("tokens are verified several at once" if drafts else "")
        if reason:
            self._refuse(reason)
        return not reason

    def schedule(self, cache: SparseCache, seen: Seen) -> Schedule | None:
        """Of a generation that `serves` lets pass and whose prompt was read. None where its tokens run every layer.

        Args:
            seen: while the prompt was read.

        Raises:
            UnsupportedError: they cannot bypass any, under `strict`.
        """
        if seen.of_call is None:  # a recorded step read it
            seen = self._of_token
        if self._structure or seen.of_call:
            return None  # `look` told why
        if reason := self._whole() or seen.of_result:
            self._refuse(reason)
            return None
        return Schedule(self.method, self.count, cache)

    def refuse_loop(self, reason: str) -> None:
        """Tokens are not counted by sparsify's loop: they run every layer.

        Raises:
            UnsupportedError: under `strict`.
        """
        if self._end:
            self._refuse(f"generate() runs transformers' loop because {reason}")

    def _refuse(self, reason: str, asked: bool = True) -> None:
        """asked: whether something is asked for that is not done."""
        if self.config.strict and asked:
            raise UnsupportedError(reason, where=self.method.name)
        refusal = str(self.method.refuse(reason))
        if refusal not in self._warned:
            self._warned.add(refusal)
            log.warning("%s", refusal)
        self._tell(Decision(self.path, None, "decode", sizes(), "", None, reason="no method acts", refusals=[refusal], kind="token"))

    def _tell(self, decision: Decision, device: str = "") -> None:
        """Records a decision where plans are collected, once for each reason."""
        key = decision.reason + "".join(decision.refusals)
        if telling.is_new(self._told, key):
            telling.tell(decision, device)

    def _site(self, hidden: Tensor) -> TokenSite:
        batch, tokens, width = hidden.shape
        heads = int(self.text.num_attention_heads)
        head_dim = int(getattr(self.text, "head_dim", None) or width // heads)
        kv_heads = int(getattr(self.text, "num_key_value_heads", None) or heads)
        return TokenSite(self.path, AttentionSizes(batch, heads, kv_heads, 1, tokens + 1, head_dim, head_dim, hidden.dtype), self.matrices)


def _trouble(cache: Any) -> str:
    """Why layers of a cache cannot hold fewer tokens than others; empty where they can."""
    if not isinstance(cache, SparseCache):
        return f"a {type(cache).__name__} has one number of tokens for all layers"
    if cache.layers[0].shard is not None:
        return "the text is divided among processes"
    if caches.keeps_past(cache):
        return "the cache keeps apart what may be taken back"
    if cache.offloader is not None:
        return "each layer's keys are brought from the host's memory while the one before runs"
    if any(layer.is_sliding for layer in cache.layers):
        return "the cache has layers with a sliding window, which counts places that are left out"
    return next(filter(None, map(left_out.places_trouble, cache.layers)), "")


class Schedule:
    """The layers that the tokens of one generation bypass."""

    def __init__(self, method: Any, count: int, cache: SparseCache):
        self.method, self.count, self.cache = method, count, cache
        self.age = 0
        self._gone = _NONE

    def next(self) -> contextlib.AbstractContextManager[None]:
        """Around the step of the next token."""
        self._now = self.method.bypassed(self.age, self.count)
        return bypassing(self._now)

    def stored(self) -> None:
        """The step ran: its token was given to all layers but these."""
        for number in self._now:
            self.cache.layers[number].left_out += 1
        self._gone = max(self._gone, self._now, key=len)
        self.age += 1

    def finish(self) -> None:
        """After the last step: of bypassed layers no token can be taken back, since which one is the last is another's."""
        for number in self._gone:
            layer = self.cache.layers[number]
            layer.fixed = int(layer.length)


def handed_on(hidden: Any, before: Any) -> Any:
    """What a bypassed layer gives back: the residual stream as it came, in the form of the result of the layer before."""
    return (hidden, *before[1:]) if type(before) is tuple else hidden
