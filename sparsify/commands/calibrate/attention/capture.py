"""Runs a model over pieces of a text and hands every attention site's operands over, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify import pipeline
from sparsify.commands.calibrate.attention import gradients
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import UnsupportedError
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


# gets the site, query, key and value [1, heads, tokens, head_dim], and the gradient with respect to the output where it is followed; gives
# what the attention gives instead of its own output, or None
Receiver = Callable[..., Tensor | None]


class Capture:
    """What was found in a model.

    sites: by place. refused: reasons by place.

    Args:
        receive: called at each site. methods: that a site has to be served by; without any, xattention.
        follow: whose gradients it gets; None: none are computed, and what it gives is what the site gives.
        every_row: whether logits of all rows are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Config,
        receive: Receiver,
        methods: Sequence[Pass] = (),
        follow: gradients.Predictions | None = None,
        every_row: bool = False,
    ):
        self.sites: dict[Place, Captured] = {}
        self.refused: dict[Place, str] = {}
        self._model, self._settings, self._receive, self._follow = model, settings, receive, follow
        self._methods = methods or [XAttention.model_validate({})]
        self._calls: list[Captured] = []
        self._every_row = every_row or follow is not None
        self._entered: list[Callable[..., Any]] = []  # graphs of the last run

    @contextmanager
    def running(self) -> Generator[Callable[[Tensor], Tensor]]:
        """Gives a function that runs the model over ids, int64 [1, tokens], and back again where gradients are asked for. It returns
        logits, [1, rows, vocabulary].

        Raises:
            UnsupportedError: by that function: the model is not one graph, through which gradients could be followed.
        """
        extra: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            extra["logits_to_keep"] = int(not self._every_row)  # 0: all
        frozen = [weight for weight in self._model.parameters() if weight.requires_grad and self._follow is not None]
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            with isolated.compiled(self._model.forward, self._backend, dynamic=False) as forward:
                yield lambda ids: self._run(forward, ids, extra)
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _run(self, forward: Callable[..., Any], ids: Tensor, extra: dict[str, Any]) -> Tensor:
        self._entered.clear()
        logits = forward(input_ids=ids, **extra).logits
        if self._follow is None or not self._calls:
            return logits
        if len(self._entered) != 1 or not logits.requires_grad:
            what = f"its forward pass is {len(self._entered)} graphs, and gradients are followed through one"
            raise UnsupportedError(what, where="--weigh loss", hint="--weigh error needs none")
        logits.backward(self._follow.gradient(logits, ids))
        return logits.detach()

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sites = find_attention(gm)
        context = pipeline.make_context(sites[0].device, self._settings) if sites else None
        editor, kept, cuts = Editor(gm.graph), [], []
        for site, place in zip(sites, places(sites), strict=True):
            assert context is not None
            if (reason := _obstacle(site, self._methods, context)) or not isinstance(site.scale, int | float):
                self.refused[place] = reason or "its scores are scaled by a tensor"
                continue
            captured = self.sites[place] = Captured(place, site.layer, site.sizes, float(site.scale))
            self._calls.append(captured)
            cuts.append(self._record_at(editor, editor.converted(site), len(self._calls) - 1))
            kept.append(site)
        editor.erase_orphans(kept)
        runs = gm if self._follow is None else gradients.in_parts(gm, cuts)
        runs.recompile()

        def run(*inputs: Any) -> Any:
            self._entered.append(run)
            with torch.set_grad_enabled(self._follow is not None):
                return runs.forward(*inputs)

        return run

    def _record_at(self, editor: Editor, site: AttentionSite, index: int) -> fx.Node:
        """Lets the site run without its mask, which is proved to be plain causal, and hand over what it is computed from. Returns the node
        that does."""
        operands = (site.query, site.key, site.value)
        call: dict[str, Any] = {"is_causal": True, "scale": self._calls[index].scale}
        shown = operands
        if (group := int(self._calls[index].sizes.query_heads) // int(self._calls[index].sizes.kv_heads)) > 1:
            if site.dtype in (torch.float16, torch.bfloat16):
                call["enable_gqa"] = True
            else:  # only kernels of these dtypes read grouped heads; the others would hold every score
                shown = (site.query, *(editor.method("repeat_interleave", one, group, 1) for one in (site.key, site.value)))
        output = editor.call(F.scaled_dot_product_attention, *shown, **call)
        with editor.graph.inserting_after(output):
            node = editor.graph.call_function(self._record, (index, output, *map(editor.current, operands)))
        node.meta["example_value"] = output.meta["example_value"]
        editor.replace(site, node)
        return node

    def _record(self, index: int, output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = self._calls[index]
        if self._follow is None:
            instead = self._receive(call, query, key, value)
            return output if instead is None else instead
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        receive = lambda *found: self._receive(call, *found)
        return gradients.Watch.apply(output, query, key, value, anchor, receive)


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
    if isinstance(site.scale, int | float) and site.scale <= 0:
        return "its scores are not scaled by a positive number"
    return ""
