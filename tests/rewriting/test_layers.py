"""Graphs that are compiled by layers: one piece of each kind is compiled, whatever the number of layers, and nothing changes in value."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify.rewriting import layers
from tests.support.tiny_models import build

IDS = torch.arange(2 * 24).reshape(2, 24) % 50


def compiled_pieces(function, *calls, dynamic=None):
    """The results of calls of a function that is compiled by layers, and how many pieces each of its graphs compiled; None: as a whole."""
    counts = []

    def backend(gm, example_inputs):
        made = []
        run = layers.compile_by_layers(gm, lambda piece, inputs: made.append(inputs) or piece.forward)
        counts.append(len(made) if run is not None else None)
        return run or gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
        return [run(**call) for call in calls], counts


class Block(nn.Module):
    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8, dtype=dtype), scale

    def forward(self, x):
        return x + self.linear(x.to(self.linear.weight.dtype)).float() * self.scale


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sum(-1)


@pytest.mark.parametrize("count", [4, 9])
def test_one_piece_is_compiled_for_all_layers(count):
    model, x = Stack([Block() for _ in range(count)]), torch.randn(3, 8)
    (got,), counts = compiled_pieces(model, {"x": x})
    assert counts == [2]  # a layer, and the sum after the last one
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("odd", [Block(2.0), Block(dtype=torch.float64)], ids=["constant", "dtype"])
def test_a_layer_that_differs_gets_a_piece_of_its_own(odd):
    model, x = Stack([Block(), Block(), odd, Block()]), torch.randn(3, 8)
    (got,), counts = compiled_pieces(model, {"x": x})
    assert counts == [3]
    torch.testing.assert_close(got, model(x))


class Writing(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3, 8))

    def forward(self, x):
        self.seen.copy_(x)
        return super().forward(x) + self.seen


def test_buffers_that_layers_write_are_each_layers_own():
    model, x = Stack([Writing() for _ in range(4)]), torch.randn(3, 8)
    with torch.no_grad():
        want = model(x)
    seen = [block.seen.clone() for block in model.blocks]
    for block in model.blocks:
        block.seen.zero_()
    (got,), counts = compiled_pieces(model, {"x": x})
    assert counts == [2]
    torch.testing.assert_close(got, want)
    for block, before in zip(model.blocks, seen, strict=True):
        torch.testing.assert_close(block.seen, before)


def test_layers_that_share_memory_are_not_of_the_kind_of_those_that_do_not():
    """Two layers write one buffer, two have each their own: whether a written input is read by another name is part of a kind."""

    class Two(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            self.first.add_(x)
            return x + self.second

    def model(shared):
        def block(alias):
            buffer = torch.zeros(3, 8)
            return Two(buffer, buffer.view(3, 8) if alias else torch.zeros(3, 8))

        return Stack([block(alias) for alias in shared])

    shared = (True, False, False, False, True)
    x = torch.randn(3, 8)
    want = model(shared)(x)
    (got,), counts = compiled_pieces(model(shared), {"x": x})
    assert counts == [3]
    torch.testing.assert_close(got, want)


class Cached(nn.Module):
    def forward(self, x, kept):
        return x + torch.cat([kept, x]).sum(0), kept.shape[0]


class Growing(nn.Module):
    """Layers whose inputs have sizes of their own, as the keys of a cache have."""

    def __init__(self, count: int):
        super().__init__()
        self.blocks = nn.ModuleList([Cached() for _ in range(count)])

    def forward(self, x, kept):
        total = 0
        for block, tensor in zip(self.blocks, kept, strict=True):
            x, size = block(x, tensor)
            total = total + size
        return x, total


def test_sizes_of_layers_may_have_symbols_of_their_own():
    model = Growing(5)
    calls = [{"x": torch.randn(3, 8), "kept": [torch.randn(n, 8) for n in sizes]} for sizes in ((4,) * 5, (5,) * 5, (7, 8, 9, 10, 11))]
    for call in calls:
        for tensor in call["kept"]:
            torch._dynamo.mark_dynamic(tensor, 0)
    results, counts = compiled_pieces(model, *calls)
    assert counts == [1]
    for call, (got, total) in zip(calls, results, strict=True):
        want, size = model(**call)
        torch.testing.assert_close(got, want)
        assert total == size


def test_an_assumption_of_the_compiled_layer_is_guarded_for_the_others():
    """What compiling the first layer asks of its sizes, here that they are even, holds for those that it serves, in later calls too."""
    model, seen = Growing(4), []

    def backend(gm, example_inputs):
        def compiler(piece, inputs):
            sizes = [value for value in inputs if isinstance(value, torch.SymInt)]
            seen.append(all(size % 2 == 0 for size in sizes))  # a guard
            return piece.forward

        return layers.compile_by_layers(gm, compiler) or gm.forward

    def call(*sizes):
        kept = [torch.randn(n, 8) for n in sizes]
        for tensor in kept:
            torch._dynamo.mark_dynamic(tensor, 0)
        return {"x": torch.randn(3, 8), "kept": kept}

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        run(**call(4, 6, 8, 10))
        assert seen == [True]
        run(**call(6, 8, 10, 12))
        assert seen == [True]  # nothing new: all are even
        run(**call(6, 8, 10, 13))
        assert seen[1:] != []  # the last layer's size is odd: traced again


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.samples(1)
def test_models_give_eager_results(cached):
    model = deeper("llama")
    calls = [{"input_ids": IDS, "use_cache": cached}]
    (got,), counts = compiled_pieces(model.forward, *calls)
    assert counts == [3]  # before the layers, a layer, after them
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model(**calls[0]).logits)


@pytest.mark.slow
def test_a_cache_that_grows_gives_every_layer_the_same_piece(monkeypatch):
    """Each layer's keys and values have sizes of their own, and the names of these come in another order in each layer."""
    import torch._inductor.compile_fx as inductor

    pieces = []
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *rest, **kw: pieces.append(gm) or gm.forward)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes)).eval()
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompts = [IDS[:1, :length] for length in (24, 17)]
    with torch.no_grad():
        want = [model.generate(ids, attention_mask=torch.ones_like(ids), **given) for ids in prompts]
        torch._dynamo.reset()
        sparsify.compile(model, whole=True, strict=True, passes=["dense"])
        for ids, tokens in zip(prompts, want, strict=True):
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **given), tokens)
    # a prompt, a token, both with sizes that vary. Each: what lies before the layers, the first, one for the others, what comes after
    assert len(pieces) <= 4 * 4
    assert max(len(gm.graph.nodes) for gm in pieces) < 2 * 100  # a layer has about 80


def deeper(family: str) -> nn.Module:
    """A model of a family with twice its layers."""
    model = build(family)
    model.model.layers = nn.ModuleList([*model.model.layers, *build(family).model.layers])
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)
    return model


@pytest.mark.parametrize("method", ["dense", "sink_window"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.samples(2)
def test_rewritten_models_are_split_too(monkeypatch, method, padded):
    """What the layers share, such as flags made from the mask that a caller gives, belongs to the first or to what lies before it."""
    import torch._inductor.compile_fx as inductor

    pieces = []
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *rest, **kw: pieces.append(gm) or gm.forward)
    model, mask = deeper("llama"), torch.ones_like(IDS)
    mask[0, :3] = 1 - int(padded)
    options = {"strict": True, "passes": [method], "min_length": 0, "sink_window": {"sinks": 1, "window": 4}}
    call = {"input_ids": IDS, "attention_mask": mask, "use_cache": True}
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="sparsify", options=options)(**call).logits
        want = model(**call).logits
    assert 3 <= len(pieces) <= 4  # before the layers, the first if it makes what all share, one for the others, after them
    if method == "dense":
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_what_spans_layers_leaves_the_graph_whole():
    model, x = Stack([Block() for _ in range(4)]), torch.randn(3, 8)

    def mixed(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert compiled_pieces(mixed, {"x": x})[1] == [None]
    assert compiled_pieces(Stack([Block(), Block()]), {"x": x})[1] == [None]  # too few to be worth it
    assert compiled_pieces(nn.Sequential(nn.Linear(8, 8)).forward, {"input": x})[1] == [None]


def test_gradients_leave_the_graph_whole():
    model, x, counts = Stack([Block() for _ in range(4)]), torch.randn(3, 8), []

    def backend(gm, example_inputs):
        counts.append(layers.compile_by_layers(gm, lambda piece, inputs: piece.forward))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    assert counts == [None]


@pytest.mark.slow
def test_inductor_compiles_layers_once(monkeypatch):
    import torch._inductor.compile_fx as inductor

    model, x, sizes = Stack([Block() for _ in range(4)]), torch.randn(3, 8), []
    compile_fx = inductor.compile_fx
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, *rest, **kw: sizes.append(len(gm.graph.nodes)) or compile_fx(gm, *rest, **kw))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="sparsify", options={"strict": True})(x)
        assert len(sizes) == 2
        torch.testing.assert_close(got, model(x))
        torch._dynamo.reset()
        sizes.clear()
        torch.compile(model, backend="sparsify", options={"strict": True, "share_layers": False})(x)
        assert len(sizes) == 1
