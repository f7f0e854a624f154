"""Encoders beside a decoder, such as a vision tower: their layers are regions too, one for each kind.

They have neither caches nor masks of their own, and what no region serves runs as it is, within the same call.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsify.generation.regions import layers
from sparsify.generation.regions.layers import Layer
from sparsify.graph.module_paths import layer_number
from sparsify.planning.config import layer_patterns
from sparsify.planning.config.config import Config
from sparsify.planning.saved_plan import SavedPlan, load_saved_plan

log = logging.getLogger(__name__)

# an attention over several texts that lie one after the other is one for each of them: a graph of more takes long to compile
MOST_TEXTS = 8
_BOUNDS = "cu_seqlens"


class Towers:
    """The towers of a model.

    layers: of all of them.
    """

    def __init__(self, model: nn.Module, decoder: Sequence[Layer], config: Config):
        self.layers = layers.find_towers(model, decoder)
        saved = load_saved_plan(config.plan)
        described = {layer.path: (layers.signature(layer.module), asked(layer, config, saved)) for layer in self.layers}
        known: dict[Any, int] = {}
        self._kinds = {path: known.setdefault(key, len(known)) for path, key in described.items()}
        self._watch = layers.Watch(self.layers)
        # a plan that says nothing of a tower leaves it as it is
        unknown = (layer.path for layer in self.layers if saved is not None and not saved.decisions_in(layer.path))
        self._left = {self._kinds[path] for path in unknown}

    def kind(self, layer: Layer) -> tuple[str, int]:
        """What layers have in common that one region can serve."""
        return "tower", self._kinds[layer.path]

    def trouble(self) -> str:
        """Why regions would miss something of the towers as they are now; empty where they would not."""
        self._watch.look_again()
        return self._watch.trouble()

    def serves(self, layer: Layer, given: Mapping[str, Any]) -> bool:
        """Whether a region may serve a call of the layer. given: its arguments."""
        return self._kinds[layer.path] not in self._left and texts(given) <= MOST_TEXTS

    def leave(self, layer: Layer, reason: str) -> None:
        """Layers of its kind run as they are from now on."""
        log.info("%s and its like run as they are: %s", layer.path, reason)
        self._left.add(self._kinds[layer.path])


def texts(given: Mapping[str, Any]) -> int:
    """Texts that a layer is given one after the other in one row, by their bounds; 1 without any."""
    bounds = given.get(_BOUNDS)
    return bounds.shape[0] - 1 if isinstance(bounds, Tensor) else 1


def asked(layer: Layer, config: Config, saved: SavedPlan | None) -> Any:
    """What rules and plan say about the sites that may lie in a layer."""
    found = []
    for name, _ in layer.module.named_modules() if config.rules else ():
        path = f"{layer.path}.{name}" if name else layer.path
        for site in (path, f"{path}.cache"):
            found.append(tuple(frozenset(layer_patterns.numbers(rule.layers, site, layer_number(site))) for rule in config.rules))
    measured = config.objective is not None or config.max_error is not None
    return tuple(found), saved and saved.decisions_in(layer.path, measured)
