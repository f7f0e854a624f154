"""What kernels serve, said once: the kernel and the methods that choose it agree."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.attention import hopper
from sparsify.backends.select import source
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import HOPPER, score_tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 40, 64, 100, 128, 256, 264])
def test_the_hopper_kernel_serves_what_the_limits_say(dim, dtype):
    query, key = torch.empty(1, 2, 64, dim, dtype=dtype), torch.empty(1, 1, 64, dim, dtype=dtype)
    found = hopper.serves(AttentionCall(query, key, key, scale=0.1, causal=True), (9, 0), (3, 6))
    assert found == HOPPER.obstacle(dtype, (dim, dim))
    if HOPPER.faster_than_sdpa(dtype, dim):
        assert found is None


@pytest.mark.parametrize("int8", [False, True])
def test_the_cost_model_assumes_the_tile_that_runs(int8):
    tiling = source.INT8_TILING if int8 else source.TMA_TILING
    assert score_tile(int8) == (tiling.rows, tiling.cols, tiling.per_sm)
