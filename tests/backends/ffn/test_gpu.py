"""Generated feed-forward kernels on a real GPU: against the reference, and inside a CUDA graph whose flags change between replays."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.ffn import reference
from sparsify.ops import feed_forward
from tests.support.harness import holding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CALL = {
    "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": 1e-5, "post_norm": "none", "post_eps": 0.0,
    "scale": 1.0, "threshold": 0.9, "skip_next": 2, "version": feed_forward.VERSION,
}  # fmt: skip


def operands(rows: int, hidden: int, intermediate: int, dtype: torch.dtype):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float32)
    x = draw(rows, 1, hidden).to(dtype)
    up, gate = (draw(intermediate, hidden) * hidden**-0.5 for _ in range(2))
    down = draw(hidden, intermediate) * intermediate**-0.5
    return x, up.to(dtype), down.to(dtype), {**CALL, "gate": gate.to(dtype), "norm_weight": (draw(hidden) * 0.1 + 1).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(4096, 14336), (768, 3072), (1000, 2500)])
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_like_the_reference(rows, sizes, dtype):
    from sparsify.backends.ffn import few_rows

    x, up, down, call = operands(rows, *sizes, dtype)
    remaining = torch.tensor([(0, -1, 2)[i % 3] for i in range(rows)], device="cuda", dtype=torch.int32)
    got, after = few_rows.ffn(x, x, remaining, up, down, **call)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    want, _ = reference.ffn(x.double(), x.double(), remaining, up.double(), down.double(), **wide)
    bound = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype] * want.abs().max()
    assert (got.double() - want).abs().max() <= bound
    assert torch.equal(got[remaining > 0], x[remaining > 0])
    assert (after[remaining > 0] == 1).all() and (after[remaining < 0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4096, 14336), (768, 3072), (1000, 2504)])
@pytest.mark.parametrize("rows", [33, 1000, 5000])
def test_many_rows_like_the_reference(rows, sizes, dtype):
    from sparsify.backends.ffn import few_rows

    x, up, down, call = operands(rows, *sizes, dtype)
    generator = torch.Generator(device="cuda").manual_seed(rows)
    remaining = torch.randint(-1, 3, (rows,), device="cuda", dtype=torch.int32, generator=generator)
    got, after = few_rows.ffn(x, x, remaining, up, down, **call)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    want, _ = reference.ffn(x.float(), x.float(), remaining, up.float(), down.float(), **wide)
    assert (got.float() - want).abs().max() <= {torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype] * want.abs().max()
    assert torch.equal(got[remaining > 0], x[remaining > 0])
    assert torch.equal(after[remaining > 0], remaining[remaining > 0] - 1) and (after[remaining < 0] == -1).all()
    # a row's sums do not depend on where it is compacted to
    dense, _ = few_rows.ffn(x, x, torch.full_like(remaining, -1), up, down, **call)
    assert torch.equal(got[remaining <= 0], dense[remaining <= 0])


@pytest.mark.parametrize("rows", [2, 700])
def test_flags_change_between_replays_of_one_graph(rows):
    from sparsify.backends.ffn import few_rows

    x, up, down, call = operands(rows, 2048, 8192, torch.bfloat16)
    flags = torch.zeros(rows, device="cuda", dtype=torch.int32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        few_rows.ffn(x, x, flags, up, down, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, after = few_rows.ffn(x, x, flags, up, down, **call)
    want, _ = few_rows.ffn(x, x, flags, up, down, **call)
    for values in ([0, 0], [1, 0], [3, 3], [0, 0], [-1, 2]):
        flags.copy_(torch.tensor(values).repeat(rows // 2))
        graph.replay()
        torch.cuda.synchronize()
        skips = flags > 0
        assert torch.equal(out[skips], x[skips]) and torch.equal(out[~skips], want[~skips])
        assert torch.equal(after[skips], flags[skips] - 1)


def generated(model, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Logits of a prompt's last row and of `tokens` given tokens after it."""
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=128)
    # tensors that the first compiled call makes would lie in its CUDA graph's pool, which the next step reuses
    cache.early_initialization(ids.shape[0], config.num_key_value_heads, config.head_dim, model.dtype, ids.device)
    parts = ids.split([ids.shape[1] - tokens] + [1] * tokens, 1)
    found = []
    for part in parts:
        if ids.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        found.append(model(input_ids=part, **holding(cache)).logits[:, -1].float().clone())
    return torch.stack(found, 1)


def whole_model(device: str, dtype: torch.dtype, mode: dict) -> None:
    """Every second block left out of a prompt of 80 rows and of tokens after the second, twice: runs do not go on from prompt to prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, head_dim=64, **sizes, initializer_range=0.08)
    model = LlamaForCausalLM(config).eval().to(device, dtype)
    prompts = [torch.randint(3, 128, (2, length), device=device) for length in (45, 49)]
    step = [0]

    def leave_out(module, inputs, output):
        return torch.zeros_like(output) if output.shape[1] > 1 or step[0] >= 2 else output

    def count(module, inputs, output):
        step[0] = 0 if inputs[0].shape[1] > 1 else step[0] + 1

    handles = [model.model.layers[i].mlp.register_forward_hook(leave_out) for i in (1, 3)]
    handles.append(model.lm_head.register_forward_hook(count))
    with torch.no_grad():
        want = [generated(model, ids, 5) for ids in prompts]
        for handle in handles:
            handle.remove()
        dense = [generated(model, ids, 5) for ids in prompts]
        skip = {"cold_first": 0, "cold_last": 0, "warmup": 2, "threshold": -1.0, "prefill": True}
        options = {"passes": ["ffn_skip"], "ffn_skip": skip, "min_length": 0, "strict": True, **mode}
        torch._dynamo.reset()
        feed_forward.forget_runs()
        model.compile(backend="sparsify", options=options)
        got = [generated(model, ids, 5) for ids in prompts]
    bound = 0.06 if dtype == torch.bfloat16 else 1e-4
    for mine, theirs, other in zip(got, want, dense, strict=True):
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()
        assert (other - theirs).abs().max() > 4 * bound * theirs.abs().max()


@pytest.mark.parametrize("mode", [{}, {"mode": "reduce-overhead"}], ids=["", "graphs"])
def test_a_whole_model_skips_in_prompt_and_tokens(mode):
    whole_model("cuda", torch.bfloat16, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["split", "gate_up", "plain"])
def test_parts_like_the_reference_with_the_memory_of_one(layout, dtype):
    from sparsify.backends.ffn import in_parts

    rows, part_rows, hidden, intermediate = 5000, 1024, 512, 4096
    x, up, down, call = operands(rows, hidden, intermediate, dtype)
    gate = call["gate"] if layout == "split" else None
    up = torch.cat([call["gate"], up]) if layout == "gate_up" else up
    call = {"gate": gate, "layout": layout, "transposed": False, "activation": "silu", "version": feed_forward.VERSION}
    call |= dict.fromkeys(("up_bias", "gate_bias", "down_bias"))
    whole = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    want = in_parts.plain(x.double(), up.double(), down.double(), part_rows=rows, **whole)
    in_parts.with_kernel(x, up, down, part_rows=part_rows, **call)  # cuBLAS's own workspace is there from here on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = in_parts.with_kernel(x, up, down, part_rows=part_rows, **call)
    taken = torch.cuda.max_memory_allocated() - before
    bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype] * want.abs().max()
    assert (got.double() - want).abs().max() <= bound
    wide = part_rows * intermediate * x.element_size() * (1 if layout == "plain" else 2)
    assert taken <= got.numel() * got.element_size() + wide + (4 << 20)
