"""Encoders beside a decoder, such as a vision tower: their layers are regions too, one for each kind.

They have neither caches nor masks of their own, and what no region serves runs as it is, within the same call.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.generation.regions import documents, layers
from sparsify.generation.regions.layers import Layer
from sparsify.graph.module_paths import layer_number
from sparsify.planning.config import layer_patterns
from sparsify.planning.config.config import Config
from sparsify.planning.saved_plan import SavedPlan, load_saved_plan

log = logging.getLogger(__name__)

# where no mask serves a layer, an attention over several texts is one for each of them: a graph of more takes long to compile
MOST_TEXTS = 8


class Towers:
    """The towers of a model.

    layers: of all of them.
    """

    def __init__(self, model: nn.Module, decoder: Sequence[Layer], config: Config):
        self.layers = layers.find_towers(model, decoder, documents.told)
        saved = load_saved_plan(config.plan)
        described = {layer.path: (layers.signature(layer.module), asked(layer, config, saved)) for layer in self.layers}
        known: dict[Any, int] = {}
        self._kinds = {path: known.setdefault(key, len(known)) for path, key in described.items()}
        self._watch = layers.Watch(self.layers)
        # a plan that says nothing of a tower leaves it as it is
        unknown = (layer.path for layer in self.layers if saved is not None and not saved.decisions_in(layer.path))
        self._left = {self._kinds[path] for path in unknown}
        # by kind, dtype and device, whether calls over texts with bounds may be one attention
        self._over_documents: dict[Any, bool] = {}

    def kind(self, layer: Layer) -> tuple[str, int]:
        """What layers have in common that one region can serve."""
        return "tower", self._kinds[layer.path]

    def trouble(self) -> str:
        """Why regions would miss something of the towers as they are now; empty where they would not."""
        self._watch.look_again()
        return self._watch.trouble()

    def serves(self, layer: Layer, given: Mapping[str, Any], hidden: Tensor) -> bool:
        """Whether a region may serve a call of the layer. given: its arguments."""
        if self._kinds[layer.path] in self._left:
            return False
        return texts(given) <= MOST_TEXTS or self.over_documents(layer, given, hidden) is not False

    def over_documents(self, layer: Layer, given: Mapping[str, Any], hidden: Tensor) -> bool | None:
        """Whether a call is one attention over a document for each text: False without bounds, None where it was not tried yet."""
        return self._over_documents.get(self._called(layer, given, hidden)) if documents.bounds(given) is not None else False

    def tried(self, layer: Layer, given: Mapping[str, Any], hidden: Tensor, holds: bool) -> None:
        """A call of the layer over documents was compared with the layer as it is."""
        if not holds:
            log.info("%s and its like attend to texts one after the other", layer.path)
        self._over_documents[self._called(layer, given, hidden)] = holds

    def _called(self, layer: Layer, given: Mapping[str, Any], hidden: Tensor) -> Any:
        return self._kinds[layer.path], texts(given) > 1, hidden.dtype, hidden.device, torch.is_grad_enabled()

    def leave(self, layer: Layer, reason: str) -> None:
        """Layers of its kind run as they are from now on."""
        log.info("%s and its like run as they are: %s", layer.path, reason)
        self._left.add(self._kinds[layer.path])


def texts(given: Mapping[str, Any]) -> int:
    """Texts that a layer is given one after the other in one row, by their bounds; 1 without any."""
    bounds = documents.bounds(given)
    return 1 if bounds is None else bounds.shape[0] - 1


def asked(layer: Layer, config: Config, saved: SavedPlan | None) -> Any:
    """What rules and plan say about the sites that may lie in a layer."""
    found = []
    for name, _ in layer.module.named_modules() if config.rules else ():
        path = f"{layer.path}.{name}" if name else layer.path
        for site in (path, f"{path}.cache"):
            found.append(tuple(frozenset(layer_patterns.numbers(rule.layers, site, layer_number(site))) for rule in config.rules))
    measured = config.objective is not None or config.max_error is not None
    return tuple(found), saved and saved.decisions_in(layer.path, measured)
