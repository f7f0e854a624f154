"""The table of docs/several-gpus.md: an 8B shape on 4 and 8 H200, by forecast.

    python -m benchmarks.mesh.forecast

Nothing is run. Dense attention is the `dense` side of no method; with `xattention` 5 % of the blocks are kept.
"""

from __future__ import annotations

from benchmarks.lib.models import SHAPES
from sparsify.commands.cost import device, forecaster, meta_model, ways
from sparsify.planning import registry
from sparsify.planning.config import config

LENGTHS = (1 << 17, 1 << 19, 1 << 20)
GPUS = (4, 8)
DENSITY = 0.05


def text() -> str:
    """The table in Markdown, with what the links are taken for."""
    from transformers import LlamaConfig

    options = {"passes": ["xattention", "dense"], "xattention": {"density": DENSITY}}
    chosen = config.load(options, method_models=registry.discover(), environ={}, cwd="/nonexistent")
    one = device.named("h200")
    model = meta_model.build("8B", config=LlamaConfig(**SHAPES["8b"], dtype="bfloat16"))
    asked = forecaster.Forecaster(model, chosen, device.context(one, chosen))
    compared = [ways.compare(asked, LENGTHS, gpus, 256, device.memory("h200", one)) for gpus in GPUS]
    note = compared[0].forecasts[-1].notes[-2]
    return f"{ways.markdown(compared, LENGTHS)}\n\n{note[0].upper()}{note[1:]}."


if __name__ == "__main__":
    print(text())
