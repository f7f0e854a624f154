"""Runs a model over pieces of a text and hands every attention site's operands over, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from sparsify import pipeline
from sparsify.costs.sizes import AttentionSizes
from sparsify.graph import isolated
from sparsify.matching.attention import find_attention
from sparsify.matching.sites import AttentionSite
from sparsify.passes.xattention import XAttention
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Place, places
from sparsify.planning.method import Context, Pass, Refusal
from sparsify.rewriting.editor import Editor


@dataclass(frozen=True)
class Captured:
    """A site that can be calibrated. sizes: of the call that was captured. scale: of its logits."""

    place: Place
    layer: int | None
    sizes: AttentionSizes
    scale: float


Receiver = Callable[[Captured, Tensor, Tensor, Tensor], None]


class Capture:
    """What was found in a model.

    sites: by place. refused: reasons by place.
    """

    def __init__(self, model: nn.Module, settings: Config, receive: Receiver, methods: Sequence[Pass] = ()):
        """methods: that a site has to be served by; without any, xattention."""
        self.sites: dict[Place, Captured] = {}
        self.refused: dict[Place, str] = {}
        self._model, self._settings, self._receive = model, settings, receive
        self._methods = methods or [XAttention.model_validate({})]
        self._calls: list[Captured] = []

    @contextmanager
    def running(self) -> Generator[Callable[[Tensor], None]]:
        """Gives a function that runs the model over ids, int64 [1, tokens]."""
        extra: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            extra["logits_to_keep"] = 1
        with isolated.compiled(self._model.forward, self._backend, dynamic=False) as forward:
            yield lambda ids: forward(input_ids=ids, **extra)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sites = find_attention(gm)
        context = pipeline.make_context(sites[0].device, self._settings) if sites else None
        for site, place in zip(sites, places(sites), strict=True):
            assert context is not None
            if (reason := _obstacle(site, self._methods, context)) or not isinstance(site.scale, int | float):
                self.refused[place] = reason or "its scores are scaled by a tensor"
                continue
            captured = self.sites[place] = Captured(place, site.layer, site.sizes, float(site.scale))
            self._calls.append(captured)
            operands = Editor(gm.graph).move_to(site).arranged(site)
            with gm.graph.inserting_after(site.output):
                gm.graph.call_function(self._record, (len(self._calls) - 1, *operands.values()))
        gm.recompile()
        return gm.forward

    def _record(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        self._receive(self._calls[index], query, key, value)


def _obstacle(site: AttentionSite, methods: Sequence[Pass], context: Context) -> str:
    """Why a site cannot be calibrated; empty where it can."""
    if site.near_miss:
        return site.near_miss
    for method in methods:
        if isinstance(answer := method.propose(site, context), Refusal):
            return answer.reason
    mask = site.mask
    if not mask.causal or mask.window is not None or mask.padding is not None or mask.documents is not None:
        return f"its mask is {site.mask_text}, not plain causal"
    if site.phase != "prefill" or not mask.query_start.bottom_right or site.batch != 1:
        return "it is not the attention of one whole prompt"
    return ""
