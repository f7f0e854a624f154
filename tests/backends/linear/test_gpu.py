"""The kernels of linear layers on a GPU: against float64, one after the other in a CUDA graph, and in a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsify
from sparsify.backends.linear import reference
from sparsify.backends.linear import triton as kernels
from sparsify.ops.linear import LinearCall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def calls(rows: int, dtype: torch.dtype) -> dict[str, LinearCall]:
    weight = lambda outputs, inputs=1024: draw(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    norm = {"norm": "rms", "norm_weight": draw(1024, dtype=dtype), "eps": 1e-5} if rows == 1 else {}
    x = draw(rows, 1024, dtype=dtype)
    return {
        "three": LinearCall(x, weight(1024), weight_2=weight(256), weight_3=weight(256), **norm),
        "biased": LinearCall(x, weight(1000), weight_2=weight(72), bias=draw(1000, dtype=dtype), bias_2=draw(72, dtype=dtype)),
        "gate": LinearCall(x, weight(3000), weight_2=weight(3000), activation="silu", **norm),
        "sum": LinearCall(draw(rows, 3000, dtype=dtype), weight(1024, 3000), residual=x),
        "odd": LinearCall(draw(rows, 1001, dtype=dtype), weight(77, 1001)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 16])
def test_no_further_from_float64_than_the_library(rows, dtype):
    torch.manual_seed(rows)
    for name, call in calls(rows, dtype).items():
        right = reference.linear(call.map_tensors(torch.Tensor.double))
        for early in (False, True):
            got = dataclasses.replace(call, early=early).run()
            for mine, plain, exact in zip(got, reference.linear(call), right, strict=True):
                error = lambda x, exact=exact: ((x.double() - exact).norm() / exact.norm()).item()
                assert error(mine) <= 1.2 * error(plain) + 1e-5, name


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_kernels_that_overlap_in_a_cuda_graph_read_what_came_before(rows):
    torch.manual_seed(0)
    hidden, wide, depth = 512, 1536, 24
    # small enough that products of products neither grow nor vanish beside the residual stream
    weight = lambda outputs, inputs: draw(outputs, inputs, scale=0.5 * inputs**-0.5)
    layers = [(weight(wide, hidden), weight(wide, hidden), weight(hidden, wide)) for _ in range(depth)]
    x = draw(rows, hidden)

    def run(early: bool) -> torch.Tensor:
        y = x
        for gate, up, down in layers:
            (z,) = LinearCall(y, gate, weight_2=up, activation="silu", early=early).run()
            (y,) = LinearCall(z, down, residual=y, early=early).run()
        return y

    run(True), run(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(True)
    for seed in range(30):
        torch.manual_seed(seed)
        x.copy_(draw(rows, hidden))
        graph.replay()
        assert got.isfinite().all() and torch.equal(got, run(False))


def test_a_call_is_one_kernel():
    (call,) = (call for name, call in calls(1, torch.bfloat16).items() if name == "three")
    call.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call.run()
    assert sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_joins_them_by_itself(rows, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
    )
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 128, (rows, 40), device="cuda")
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    made = []
    monkeypatch.setattr(kernels, "run", lambda spec, *rest, run=kernels.run: (made.append(spec), run(spec, *rest)))
    found = {}
    for setting in ("never", "auto"):
        torch._dynamo.reset()
        sparsify.compile(model, linear_kernels=setting, strict=True)
        with torch.no_grad():
            found[setting] = model.generate(ids, **given)
        assert bool(made) is (setting == "auto")
    for mine, plain in zip(found["auto"].logits[:4], found["never"].logits[:4], strict=True):
        torch.testing.assert_close(mine, plain, atol=0.05, rtol=0.05)
