"""What the calls of a model share: which of its layers are of one kind, the regions that serve them, and what lies beside the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.distributed import sequence
from sparsify.distributed.shards import Shard
from sparsify.generation.regions import bypass, layers, narrowing, tensor_parallel
from sparsify.generation.regions.arguments import Arguments
from sparsify.generation.regions.layers import Layer, NotShared
from sparsify.generation.regions.narrowing import Narrowing
from sparsify.generation.regions.packing import Packing
from sparsify.generation.regions.region import Region
from sparsify.generation.regions.towers import Towers, asked
from sparsify.pipeline import Part
from sparsify.planning.config.config import Config
from sparsify.planning.saved_plan import SavedPlan, load_saved_plan

# more kinds than this take as long to compile as the whole model
MOST_KINDS = 8


class SharedLayers:
    """The layers of a model, by kind, and the regions that serve them.

    Args:
        model: of transformers.
        options: the user's, an object that all graphs of the model share.
        dynamic: as in torch.compile.
        text: this process's share of a prompt's tokens; None: it has all of them.
        compiling: called when a graph is compiled.

    Raises:
        NotShared: the layers of this model share no regions, with the reason.

    reason: why no call is served by regions any more; empty while they serve.
    """

    def __init__(self, model: nn.Module, config: Config, options: Any, dynamic: bool, text: Shard | None, compiling: Callable[[], None]):
        self.model, self.config, self.options, self.dynamic, self._compiling = model, config, options, dynamic, compiling
        self.layers = layers.find_layers(model)
        self._saved = load_saved_plan(config.plan)
        self.kinds = _kinds(self.layers, config, self._saved)
        self.towers = Towers(model, self.layers, config)
        self._by_module = {id(layer.module): layer for layer in (*self.layers, *self.towers.layers)}
        chosen = narrowing.all_asked(config, self._saved, [layer.path for layer in self.layers])
        self.part = Part(tensor_parallel.of_heads(self.layers[0].module), "" if text is None else text.group)
        if self.part.heads is not None:
            tensor_parallel.prepare_sums(self.part.heads, next(model.parameters()).device, config)
        self.narrowing = Narrowing(model, self.layers, config, chosen[0], chosen[1:], self.part.heads) if chosen else None
        self.packing = Packing(model, self.layers, self.kinds, config, self._saved, self.part)
        skipping = bypass.asked(config, self._saved, self.layers[0].path.rpartition(".")[0])
        trouble = lambda: self.reason or self.watch.trouble()
        self.bypass = None if skipping is None else bypass.Bypass(model, self.layers, config, skipping, text is not None, trouble)
        self.watch = layers.Watch(self.layers)
        self.reason = ""
        self._head_numbers: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._regions: dict[Any, Region] = {}
        self._lock = threading.RLock()

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

    def region(self, layer: Layer, arguments: Arguments, part: str, documents: int = 0) -> Region:
        """The region of a layer for calls of this form.

        Args:
            part: as `Narrowed.part` says.
            documents: of a tower's layer as `Layer.over_documents` has it: 1 over one text, 2 over several.

        Raises:
            NotShared: there is none for an argument.
        """
        regime = 0 if (shared := sequence.under_way()) is None else shared.regime
        key = (self.kind(layer), arguments.form(), part, documents, regime)
        found = self._regions.get(key)
        return self._add_region(key, layer, part) if found is None else found

    def _add_region(self, key: Any, layer: Layer, part: str) -> Region:
        with self._lock:
            found = self._regions.get(key)
            if found is None:
                alike = (one for one in (self.towers.layers if layer.tower else self.layers) if self.kind(one) == self.kind(layer))
                paths = tuple(one.path for one in alike if not part or self.narrowing is None or self.narrowing.place(one) == part)
                found = self._regions[key] = self.make_region(paths, dynamic=self.dynamic, fullgraph=not layer.tower)
        return found

    def make_region(self, paths: tuple[str, ...], function: Callable[..., Any] | None = None, **how: Any) -> Region:
        """A region of this model. how: of `Region`."""
        return Region(self.config, self.options, self.part, self._compiling, paths, function, **how)


def _kinds(found: list[Layer], config: Config, saved: SavedPlan | None) -> list[int]:
    """For every layer the number of its kind: layers of one kind differ in their weights only, and rules and plan say the same of them."""
    known: dict[Any, int] = {}
    kinds = [known.setdefault((layers.signature(layer.module), asked(layer, config, saved)), len(known)) for layer in found]
    if len(known) > MOST_KINDS:
        raise NotShared(f"its {len(found)} layers are of {len(known)} kinds")
    return kinds
