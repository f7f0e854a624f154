"""The `torch.compile` backend: reads the options and compiles a graph through the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from sparsify import pipeline, progress
from sparsify.planning import registry
from sparsify.planning.config import config


def sparsify(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """Compiles one captured graph; called by `torch.compile(model, backend="sparsify", options={...})`.

    torch.compile accepts `mode` or `options` but not both; `options={"mode": "reduce-overhead", ...}` sets both.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: mode of torch.compile.
        options: as in docs/configuration.md.
        unknown: further keyword arguments of torch.compile, treated as options.

    Returns:
        a callable with the graph's inputs and outputs.

    Raises:
        ConfigError: unknown or impossible options; the message names the place and the nearest valid name.
    """
    given = {**(options or {}), **unknown} if unknown else options
    settings = config.load(given, mode=mode, method_models=registry.discover())
    with progress.task("compiling a graph", settings.progress):
        return pipeline.compile_graph(gm, example_inputs, settings, options)
