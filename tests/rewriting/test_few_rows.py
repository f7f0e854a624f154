"""Linear layers of few rows are joined with what stands around them: how many calls that makes, what stays out, and equal results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify.backends import dispatch
from sparsify.ops.linear import LinearCall
from sparsify.rewriting import few_rows

HIDDEN, WIDE = 32, 48


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class Layer(nn.Module):
    """A decoder layer without attention."""

    def __init__(self, bias: bool = False):
        super().__init__()
        linear = lambda inputs, outputs, bias=False: nn.Linear(inputs, outputs, bias=bias)
        self.norm, self.post_norm = RMSNorm(), RMSNorm()
        self.q, self.k, self.v = linear(HIDDEN, HIDDEN, bias), linear(HIDDEN, 16, bias), linear(HIDDEN, 16, bias)
        self.o, self.down = linear(HIDDEN, HIDDEN), linear(WIDE, HIDDEN)
        self.gate, self.up = linear(HIDDEN, WIDE), linear(HIDDEN, WIDE)

    def attend(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v], -1))

    def forward(self, x):
        x = x + self.attend(self.norm(x))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def joined(run, *args, dynamic=None, grad=False):
    """What `run` gives for the last arguments when its linear layers were joined, and the calls that were made, for each graph."""
    calls: list[list[dict[str, object]]] = []

    def backend(gm, inputs):
        few_rows.join(gm, lambda device: True)
        gm.graph.lint()
        assert list(gm.graph.nodes) == list(reversed(list(reversed(gm.graph.nodes))))
        mine = [node for node in gm.graph.nodes if node.target is LinearCall.op()]
        calls.append([dict(node.kwargs) | {"weights": 1 + sum(f"weight_{i}" in node.kwargs for i in (2, 3))} for node in mine])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for given in args:
            torch.testing.assert_close(compiled(*given), run(*given), atol=1e-5, rtol=1e-5)
    return calls


def token(rows: int = 1, size: int = HIDDEN) -> tuple[torch.Tensor]:
    return (torch.randn(rows, 1, size),)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_four_calls(bias):
    ((qkv, o, gate, down),) = joined(Layer(bias), token())
    assert qkv["weights"] == 3 and qkv["norm"] == "rms" and ("bias_3" in qkv) is bias
    assert o["weights"] == down["weights"] == 1 and "residual" in o and "residual" in down
    assert [call.get("early", False) for call in (qkv, o, gate, down)] == [False, True, True, True]
    assert gate["weights"] == 2 and gate["activation"] == "silu" and gate["norm"] == "rms"


def test_a_batch_of_any_size_is_one_graph_up_to_16_rows():
    calls = joined(Layer(), token(2), token(3), token(16), token(5), dynamic=True)
    assert [len(made) for made in calls] == [4]


def test_more_rows_are_one_more_graph():
    calls = joined(Layer(), token(2), token(17), token(9), token(40), dynamic=True)
    assert [len(made) for made in calls] == [4, 0]


def test_norms_stay_out_where_rows_may_be_many():
    ((qkv, _, gate, _),) = joined(Layer(), token(2), token(8), dynamic=True)
    assert "norm" not in qkv and "norm" not in gate


def test_a_prompt_is_left_alone():
    prompt = lambda length: (torch.randn(1, length, HIDDEN),)
    assert joined(Layer(), prompt(20), prompt(9), prompt(33), dynamic=True) == [[]]


def test_gradients_are_left_alone():
    assert joined(Layer(), token(), grad=True) == [[]]


def test_a_norm_that_something_else_reads_stays():
    layer = Layer()

    def run(x):
        y = layer.norm(x)
        return layer.q(y) + y

    ((call,),) = joined(run, token())
    assert "norm" not in call and "residual" in call


def test_a_product_that_something_else_reads_keeps_its_sum():
    layer = Layer()

    def run(x):
        y = layer.o(x)
        return x + y, y

    ((call,),) = joined(run, token())
    assert "residual" not in call


def test_a_sum_of_two_products_goes_to_one_of_them():
    one, other = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)

    def run(x):
        return one(x) + other(torch.relu(x))

    (calls,) = joined(run, token())
    assert sorted("residual" in call for call in calls) == [False, True]


def test_what_is_written_in_between_is_read_before():
    layer = Layer()

    def run(x):
        x = x.clone()
        q = layer.q(x)
        x.add_(1.0)
        return q, layer.k(x), layer.gate(x) * F.silu(layer.up(x))

    calls = joined(run, token())
    assert [call["weights"] for call in calls[0]] == [2]  # the gate alone: its operands are written before it


def test_weights_that_the_graph_writes_are_read_late():
    layer = Layer()

    def run(x, w):
        x = x * 2
        w.mul_(0.5)
        return layer.q(x), F.linear(x, w)

    ((one,),) = joined(run, (*token(), torch.zeros(HIDDEN, HIDDEN)))
    assert one["weights"] == 2 and "early" not in one


def test_a_fourth_layer_of_an_input_is_another_call():
    layer = Layer()
    run = lambda x: (layer.q(x), layer.k(x), layer.v(x), layer.o(x))
    assert [call["weights"] for call in joined(run, token())[0]] == [3, 1]


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: F.linear(x[..., :12], w[:, :12].contiguous()),
        lambda x, w: F.linear(x, w.t()),
        lambda x, w: F.linear(x, w * 2),
        lambda x, w: F.linear(x.to(torch.float64), w.to(torch.float64)),
        lambda x, w: x @ w.t(),
    ],
)
def test_what_the_kernels_do_not_take(run):
    assert joined(run, (*token(), torch.randn(HIDDEN, HIDDEN))) == [[]]


def test_rows_that_begin_between_16_bytes_are_left_alone():
    assert joined(lambda x, w: F.linear(x, w), (*token(size=12), torch.randn(HIDDEN, 12))) == [[]]


@pytest.fixture
def served(monkeypatch):
    """Rows of every call that the reference serves."""
    rows = []
    plain = dispatch._TABLE["linear"]["reference"]
    monkeypatch.setitem(dispatch._TABLE["linear"], "reference", lambda call: rows.append(call.rows) or plain(call))
    return rows


@pytest.mark.slow
def test_tokens_of_a_model_are_eagers(served):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).eval()
    prompts = [torch.randint(0, 64, (rows, 12)) for rows in (1, 3)]
    make = lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = [make(ids) for ids in prompts]
    sparsify.compile(model, lower="eager", linear_kernels="always", strict=True, validation=False)
    for ids, want in zip(prompts, wanted, strict=True):
        assert torch.equal(make(ids), want)
    assert {1, 3} <= set(served)


@pytest.mark.parametrize("setting, expected", [("auto", 0), ("never", 0), ("always", 4)])
def test_nothing_is_joined_on_a_cpu_unless_asked(served, setting, expected):
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Layer(), backend="sparsify", options={"lower": "eager", "linear_kernels": setting})(*token())
    assert len(served) == expected


@pytest.mark.unforeseen
def test_a_failure_leaves_the_graph_as_it_was(served, monkeypatch, caplog):
    def fail(*given):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(few_rows, "_emit", fail)
    layer, given = Layer(), token()
    compiled = torch.compile(layer, backend="sparsify", options={"lower": "eager", "linear_kernels": "always"})
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), layer(*given))
    assert not served and "left as they are" in caplog.text
