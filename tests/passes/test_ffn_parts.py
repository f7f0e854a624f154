"""ffn_parts on whole models and by itself: the block's values with the memory of one part."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

import sparsify
from sparsify import api
from sparsify.backends.ffn import in_parts
from sparsify.costs.device import describe
from sparsify.errors import UnsupportedError
from sparsify.matching.sites import FeedForwardSite
from sparsify.ops import feed_forward
from sparsify.planning.choose import acts_on
from sparsify.planning.config.config import Config
from sparsify.planning.registry import discover
from tests.support.harness import compiled, holding, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build

FP32 = 2e-5
# gated and plain, with biases, transposed weights, gate and up in one, norms on both sides, parallel to attention
FAMILIES = ("llama", "gpt2", "gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "gpt_neox", "olmo2", "falcon")))


def in_rows(part_rows: int, min_rows: int = 1, **options) -> dict:
    return strict(passes=["ffn_parts"], ffn_parts={"part_rows": part_rows, "min_rows": min_rows}, **options)


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(ids: torch.Tensor):
    return lambda model: model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def parts(monkeypatch):
    """Rows of each product's input, in the order of the calls."""
    seen: list[int] = []
    product = in_parts._product

    def spy(x, weight, bias, out):
        seen.append(x.shape[0])
        return product(x, weight, bias, out)

    monkeypatch.setattr(in_parts, "_product", spy)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.samples(1)
def test_a_model_in_parts_equals_eager(family, parts):
    model = build(family)
    call = logits(prompt(2, 13))
    with torch.no_grad():
        want = call(model)
    got = run(model, call, in_rows(7, validation=False))
    layers = model.config.num_hidden_layers
    assert got.rewritten("ffn_parts") == layers
    assert visible_error(got.value, want) < FP32
    # 26 rows: three whole parts and a remainder of five
    each = len(parts) // (4 * layers)
    assert parts == [count for _ in range(layers) for count in (7, 7, 7, 5) for _ in range(each)] and each in (2, 3)


def test_its_sites_are_validated():
    got = run(build("llama"), logits(prompt(1, 9)), in_rows(4))
    assert {d.validation.partition(" ")[2] for p in got.plans for d in p.decisions if d.kind == "ffn"} == {"instances agree"}


def test_a_region_serves_all_lengths_without_compiling_again(parts):
    model = build("llama")
    options = in_rows(8, min_rows=16)
    want = {}
    with torch.no_grad():
        for length in (20, 33, 41, 16, 9, 12):
            want[length] = logits(prompt(1, length))(model)
        with compiled(model, options, dynamic=True) as plans:
            for length in (20, 33, 41, 16):
                assert visible_error(logits(prompt(1, length))(model), want[length]) < FP32
            assert len(plans) == 1 and len(plans[0].rewritten) == model.config.num_hidden_layers
            parts.clear()
            for length in (9, 12):
                assert visible_error(logits(prompt(1, length))(model), want[length]) < FP32
            assert not parts
            assert len(plans) == 2 and not plans[1].rewritten
            assert any("fewer than 16 rows" in reason for d in plans[1].decisions for reason in d.refusals)


@pytest.mark.slow
def test_compiled_by_inductor():
    model = build("llama", layers=1)
    call = logits(prompt(1, 19))
    with torch.no_grad():
        want = call(model)
    got = run(model, call, in_rows(8) | {"lower": "inductor"}, dynamic=True)
    assert got.rewritten("ffn_parts") == 1
    assert visible_error(got.value, want) < FP32


def test_regions_of_layers(parts):
    model = build("llama")
    with torch.no_grad():
        want = logits(prompt(1, 20))(model)
        torch._dynamo.reset()
        with api.collect_plans() as plans:
            sparsify.compile(model, **in_rows(8, validation=False))
            got = logits(prompt(1, 20))(model)
    assert visible_error(got, want) < FP32
    assert parts and len(plans) == 1


def test_decode_stays():
    model = build("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(1, 9), **holding(cache))
    got = run(model, lambda m: m(input_ids=torch.tensor([[5]]), **holding(cache)).logits, in_rows(2))
    assert got.rewritten() == 0 and all("a token of each row" in reason for reason in got.refusals())


def test_by_default_a_cpu_is_not_asked_and_a_gpu_by_its_memory():
    config = Config()
    assert "ffn_parts" in config.passes
    here = describe(torch.device("cpu"))
    gpu = dataclasses.replace(here, type="cuda", memory=139 << 30)
    assert not acts_on("ffn", config, here) and not acts_on("ffn", config) and acts_on("ffn", config, gpu)
    method = discover()["ffn_parts"]()
    site = FeedForwardSite("", 0, 0, 1, fx.Graph().placeholder("x"), layout="split", intermediate=14336, dtype=torch.bfloat16)
    assert method._first_row(site, gpu) == (139 << 30) // 16 // (2 * 2 * 14336)  # 162 678 rows


def test_a_gpu_whose_memory_the_prompt_fills_is_rewritten_without_asking(monkeypatch):
    small = dataclasses.replace(describe(torch.device("cpu")), memory=1 << 20)
    monkeypatch.setattr("sparsify.costs.device.describe", lambda device: small)
    model = build("llama")
    for length, rewritten in ((9, 0), (300, model.config.num_hidden_layers)):
        got = run(model, logits(prompt(1, length)), {"strict": True, "lower": "eager"})
        blocks = [d for p in got.plans for d in p.decisions if d.kind == "ffn"]
        assert [d.method for d in blocks] == ["ffn_parts"] * rewritten


CASES = {
    "llama": ("split", "silu", False, False),
    "phi3": ("gate_up", "silu", False, False),
    "up_first": ("up_gate", "gelu_tanh", False, True),
    "gpt2": ("plain", "gelu_tanh", True, True),
    "neox": ("plain", "gelu", False, True),
    "opt": ("plain", "relu", False, False),
}


def operands(case: str, rows: int, dtype=torch.float32, hidden: int = 16, wide: int = 40):
    layout, activation, transposed, bias = CASES[case]
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    matrix = lambda outputs, inputs: draw(inputs, outputs) if transposed else draw(outputs, inputs)
    up = wide * (2 if layout in ("gate_up", "up_gate") else 1)
    call = {"layout": layout, "activation": activation, "transposed": transposed, "version": feed_forward.VERSION}
    call["gate"] = matrix(wide, hidden) if layout == "split" else None
    lengths = {"up_bias": up, "gate_bias": wide if layout == "split" else 0, "down_bias": hidden}
    call |= {name: draw(length) if bias and length else None for name, length in lengths.items()}
    return (draw(rows, hidden), matrix(up, hidden), matrix(hidden, wide)), call


def expected(x, up, down, *, layout, activation, transposed, gate, up_bias, gate_bias, down_bias, version):
    linear = lambda x, weight, bias: F.linear(x, weight.t() if transposed else weight, bias)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}[activation]
    wide = linear(x, up, up_bias)
    if layout == "split":
        h = act(linear(x, gate, gate_bias)) * wide
    elif layout == "plain":
        h = act(wide)
    else:
        first, second = wide.chunk(2, -1)
        h = act(first) * second if layout == "gate_up" else act(second) * first
    return linear(h, down, down_bias)


@pytest.mark.parametrize("part_rows", [1, 4, 9, 10, 64])
@pytest.mark.parametrize("case", CASES)
def test_the_op_in_parts(case, part_rows):
    args, call = operands(case, 10)
    torch.testing.assert_close(feed_forward.ffn_parts(*args, part_rows=part_rows, **call), expected(*args, **call), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (2, 3, 16), (1, 6, 16)])
def test_any_shape_of_rows_and_its_fake(shape):
    (_, up, down), call = operands("llama", 6)
    x = torch.randn(shape)
    got = feed_forward.ffn_parts(x, up, down, part_rows=4, **call)
    torch.testing.assert_close(got, expected(x, up, down, **call), atol=1e-3, rtol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = feed_forward.ffn_parts(mode.from_tensor(x), up, down, part_rows=4, **call)
    assert (fake.shape, fake.dtype, fake.stride()) == (got.shape, got.dtype, got.stride())


def test_the_op_passes_torchs_checks():
    args, call = operands("gpt2", 6)
    torch.library.opcheck(feed_forward.ffn_parts, args, {"part_rows": 4, **call})


def test_the_op_refuses_what_it_does_not_know():
    args, call = operands("llama", 6)
    with pytest.raises(UnsupportedError, match="no activation"):
        feed_forward.ffn_parts(*args, part_rows=4, **(call | {"activation": "tanh"}))
    with pytest.raises(UnsupportedError, match="no layout"):
        feed_forward.ffn_parts(*args, part_rows=4, **(call | {"layout": "three"}))


def test_one_part_alone_is_held(monkeypatch):
    """No tensor between the products has more rows than a part."""
    args, call = operands("llama", 64)
    seen: list[int] = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function not in (torch.ops.aten.t.default, torch.ops.aten.view.default):
                seen.append(result.numel())
            return result

    with Watching():
        in_parts.plain(*args, part_rows=8, **call)
    assert sorted(set(seen)) == [8 * 16, 8 * 40, 64 * 16]  # a part's input and output, what lies between, and the whole output


def test_reasons():
    got = run(build("llama"), logits(prompt(1, 9)), strict(passes=["ffn_parts", "ffn_skip"]))  # ffn_skip has blocks looked for
    assert got.rewritten() == 0
    assert any("the device's memory is not known" in reason for reason in got.refusals())


def block_function(end):
    """A block by hand: norm, gate and up, down, and what `end` makes of it and the residual stream."""
    generator = torch.Generator().manual_seed(0)
    up, gate, down = (torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.2) for shape in ((24, 8), (24, 8), (8, 24)))

    def call(x):
        n = F.layer_norm(x, (8,))
        return end(F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down), x)

    return call


def summed_in_place(out, x):
    out += x
    return out


WEIGHT = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))
ENDS = {
    "sum": lambda out, x: x + out,
    "in place": summed_in_place,
    "scaled": lambda out, x: x + 0.5 * out,
    "dropout at rest": lambda out, x: x + F.dropout(out, 0.5, training=False),
    "normed": lambda out, x: x + F.layer_norm(out, (8,), WEIGHT),
    "two streams": lambda out, x: out + x.sin() + x,
}


def run_block(call, **options):
    torch._dynamo.reset()
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    with torch.no_grad(), api.collect_plans() as plans:
        want = call(x.clone())
        got = torch.compile(call, backend="sparsify", options=in_rows(4, **options), fullgraph=True)(x)
    assert torch.equal(x, before)
    return got, want, plans


@pytest.mark.parametrize("end", ENDS)
def test_what_follows_the_products_is_kept(end, parts):
    got, want, plans = run_block(block_function(ENDS[end]), validation=False)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert [d.method for plan in plans for d in plan.decisions] == ["ffn_parts"]
    assert parts and max(parts) == 4


def test_validation_finds_a_wrong_op(monkeypatch):
    monkeypatch.setattr(in_parts, "_product", lambda x, weight, bias, out: torch.mm(x, weight, out=out).mul_(1.1))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="what was proved does not hold"):
        run_block(block_function(ENDS["sum"]))


def test_weights_of_another_dtype_under_autocast_stay():
    call = block_function(ENDS["sum"])
    with torch.autocast("cpu", torch.bfloat16):
        got, want, plans = run_block(call, validation=False)
    assert torch.equal(got, want)
    assert not any(plan.rewritten for plan in plans)


def test_gradients_stay():
    torch._dynamo.reset()
    x = torch.randn(2, 7, 8)
    with api.collect_plans() as plans:
        torch.compile(block_function(ENDS["sum"]), backend="sparsify", options=in_rows(4), fullgraph=True)(x)
    assert any("gradients" in reason for plan in plans for d in plan.decisions for reason in d.refusals)
    assert not any(plan.rewritten for plan in plans)
