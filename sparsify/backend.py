"""The torch.compile entry point: reads options, calls the pipeline, returns a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from sparsify import pipeline
from sparsify.planning import method
from sparsify.planning.config import config


def sparsify(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """`torch.compile(model, backend="sparsify", options={...})`; see docs/configuration.md for the options.

    torch allows `mode` or `options` but not both: `options={"mode": "reduce-overhead", ...}` gives both.

    Raises:
        ConfigError: unknown or impossible options, naming the place and the nearest valid name.
    """
    given = {**(options or {}), **unknown} if unknown else options
    settings = config.load(given, mode=mode, method_models=method.discover())
    return pipeline.compile_graph(gm, example_inputs, settings, options)
