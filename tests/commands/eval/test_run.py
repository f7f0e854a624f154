"""What a block of calls visited, layer by layer where that can be told."""

from __future__ import annotations

import pytest
import torch

from sparsify.commands.eval.run import Run, prepare
from sparsify.commands.eval.settings import Setting
from tests.support.tiny_models import VOCAB, build

SPARSE = {"strict": True, "lower": "eager", "min_length": 0, "xattention": {"block": 64, "threshold": 0.1}}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("mixed", [False, True])
def test_densities_are_told_by_layer_where_every_layer_selects(mixed):
    """Two calls in which one of two layers selects are as many selections as one call in which both do."""
    rules = [{"layers": "0", "method": "dense"}] if mixed else []
    run = Run(build("llama", layers=2), Setting("sparse", {**SPARSE, "rules": rules}))
    prepare(run.model, run.setting, {})
    for _ in range(2):  # what is compiled is known from the first block on
        with run.measuring() as found, torch.no_grad():
            for seed in range(2):
                run.model(torch.randint(3, VOCAB, (1, 300), generator=torch.Generator().manual_seed(seed)), use_cache=False)
        assert found.density is not None and 0 < found.density < 1
        assert (found.density_by_layer is None) == mixed
        assert mixed or len(found.density_by_layer) == 2
