"""One odd site costs that site: what nobody foresaw, a method that fails, operands that an op does not take, tensors that are more than
memory. The others are rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from sparsify import api
from sparsify.errors import RewriteError, UnsupportedError
from sparsify.matching import attention as match
from sparsify.matching import feed_forward
from sparsify.matching.context import MatchContext
from sparsify.ops import cache as cache_ops
from sparsify.ops import operands
from sparsify.ops.attention import AttentionCall
from sparsify.passes.dense import Dense
from sparsify.passes.ffn_skip import FfnSkip
from tests.support.harness import strict

SKIP = {"cold_first": 0, "cold_last": 0, "warmup": 0, "threshold": 2.0}


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 6, 4, generator=generator) for _ in range(3)]


def two(q, k, v):
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return first, F.scaled_dot_product_attention(first, k, v, is_causal=True)


@torch.no_grad()
def compiled(function, arguments, validation=False, **options):
    """Validation, which would try a rewriting before it counts, stays off but where it is asked for."""
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        got = torch.compile(function, backend="sparsify", options={**strict(passes=["dense"]), "validation": validation, **options})(
            *arguments
        )
    (plan,) = plans
    torch.testing.assert_close(got, function(*arguments), atol=2e-5, rtol=2e-5)
    assert not plan.fallback
    return plan.decisions


def fails_first(original, error):
    """The function, which fails when it is called for the first time."""
    calls = []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return original(*args, **options)

    return call


@pytest.mark.unforeseen
@pytest.mark.parametrize(("where", "name"), [(match, "_sdpa_site"), (MatchContext, "proof"), (match, "ungroup"), (Dense, "propose")])
def test_what_nobody_foresaw_costs_one_site(monkeypatch, nothing_unforeseen, where, name):
    monkeypatch.setattr(where, name, fails_first(getattr(where, name), ZeroDivisionError("by\nzero")))
    masked = lambda q, k, v: two(q, k, v)
    if name == "proof":

        def masked(q, k, v):
            one, other = two(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()), one, other

    decisions = compiled(masked, inputs())
    left = [d for d in decisions if d.method is None]
    assert len(left) == 1 and len(decisions) >= 2
    assert "ZeroDivisionError: by" in left[0].reason and "zero" not in left[0].reason
    assert [r.exc_info[0] for r in nothing_unforeseen] == [ZeroDivisionError]


@pytest.mark.unforeseen
def test_a_written_out_attention_too(monkeypatch, nothing_unforeseen):
    from sparsify.matching.eager import _WrittenOut

    monkeypatch.setattr(_WrittenOut, "describe", fails_first(_WrittenOut.describe, IndexError("beyond")))

    def written_out(q, k, v):
        one = (q @ k.mT).softmax(-1) @ v
        return one, (one @ k.mT).softmax(-1) @ v

    assert [d.method is None for d in compiled(written_out, inputs())] == [True, False]
    assert len(nothing_unforeseen) == 1


def test_a_method_that_fails_costs_one_site(monkeypatch):
    monkeypatch.setattr(Dense, "rewrite", fails_first(Dense.rewrite, KeyError("gone")))
    with pytest.warns(UserWarning, match="left a site untouched.*KeyError") as caught:
        decisions = compiled(two, inputs(), strict=False)
    assert len(caught) == 1 and [d.method for d in decisions] == [None, "dense"]
    assert decisions[0].reason.startswith("dense failed: KeyError") and "dense: dense failed" in decisions[0].refusals[-1]


def test_strict_raises_what_a_method_failed_with(monkeypatch):
    monkeypatch.setattr(Dense, "rewrite", fails_first(Dense.rewrite, KeyError("gone")))
    with pytest.raises(Exception, match="dense failed: KeyError") as caught:
        compiled(two, inputs())
    assert isinstance(caught.value.inner_exception, RewriteError)


def test_a_rewriting_that_changes_a_shape_costs_one_site(monkeypatch):
    original, calls = Dense.rewrite, []

    def rewrite(self, editor, site):
        calls.append(site)
        if len(calls) == 1:
            return editor.move_to(site).replace(site, editor.call(torch.cat, [site.query, site.query], 0))
        return original(self, editor, site)

    monkeypatch.setattr(Dense, "rewrite", rewrite)
    with pytest.warns(UserWarning, match="shape changed"):
        assert [d.method for d in compiled(two, inputs(), strict=False)] == [None, "dense"]


@pytest.mark.parametrize("validation", [False, True])
def test_every_site_may_fail(monkeypatch, validation):
    def rewrite(self, editor, site):
        raise UnsupportedError("no such thing")

    monkeypatch.setattr(Dense, "rewrite", rewrite)
    decisions = compiled(two, inputs(), validation)
    assert [d.method for d in decisions] == [None] * 2 and all("no such thing" in d.reason for d in decisions)


# -- operands ------------------------------------------------------------------------------------------------------------------------------


def call(**changed):
    q, k, v = (x.to("meta") for x in inputs())
    call = {"query": q, "key": k, "value": v, "scale": 0.5, "causal": True} | changed
    return operands.check(AttentionCall.op(), (call.pop("query"), call.pop("key"), call.pop("value")), call, None)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


FITS = {
    "grouped": {"key": meta(1, 1, 6, 4), "value": meta(1, 1, 6, 8)},
    "flags": {"key_flags": meta(1, 6, dtype=torch.uint8), "segments": meta(1, 6, dtype=torch.int32)},
    "biases": {
        "bias": meta(1, 1, 1, 6),
        "hidden_bias": meta(1, 2, 6, 6),
        "alibi_slopes": meta(1, 2),
        "sink_logits": meta(2, dtype=torch.bfloat16),
    },
}
BAD = {
    "another batch": ({"key": meta(2, 2, 6, 4)}, "key is"),
    "another length": ({"value": meta(1, 2, 7, 4)}, "value is"),
    "another head dim": ({"key": meta(1, 2, 6, 5)}, "key is"),
    "heads that do not divide": ({"query": meta(1, 3, 6, 4)}, "no multiple"),
    "another dtype": ({"value": meta(1, 2, 6, 4, dtype=torch.float16)}, "value is torch.float16"),
    "another device": ({"bias": torch.zeros(1, 2, 1, 6)}, "on cpu"),
    "merged heads": ({"bias": meta(1, 6, 1, 6)}, "bias is"),
    "a bias of three dimensions": ({"bias": meta(1, 2, 6)}, "3 dimensions"),
    "a bias of integers": ({"bias": meta(1, 2, 1, 6, dtype=torch.int64)}, "not floating point"),
    "flags of floats": ({"key_flags": meta(1, 6)}, "not integers"),
    "flags of another row": ({"segments": meta(3, 6, dtype=torch.int32)}, "segments is"),
    "slopes of other heads": ({"alibi_slopes": meta(1, 3)}, "alibi_slopes is"),
    "sinks of a batch": ({"sink_logits": meta(1, 2)}, "2 dimensions"),
    "two starts": ({"query_start": meta(2, dtype=torch.int64)}, "2 elements"),
}


@pytest.mark.parametrize("name", FITS)
def test_operands_that_fit(name):
    call(**FITS[name])


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit(name):
    changed, why = BAD[name]
    with pytest.raises(UnsupportedError, match=why):
        call(**changed)


def test_the_spec_knows_every_operand_of_its_ops():
    for op, known in operands._OPERANDS.items():
        schema = {a.name for a in getattr(torch.ops.sparsify, op).default._schema.arguments}
        assert known.keys() <= schema, op


def test_an_operand_that_does_not_fit_refuses_its_site(monkeypatch):
    """Under strict too: it is the program's, no failure."""
    original = Dense.rewrite

    def rewrite(self, editor, site):
        if site.index == 0:
            editor.move_to(site).emit(AttentionCall(site.query, site.key, site.query, sink_logits=site.value, scale=0.5, causal=True))
        return original(self, editor, site)

    monkeypatch.setattr(Dense, "rewrite", rewrite)
    decisions = compiled(two, inputs())
    assert [d.method for d in decisions] == [None, "dense"] and "sink_logits has 4 dimensions" in decisions[0].reason


# -- feed-forward blocks -------------------------------------------------------------------------------------------------------------------


class Halved(torch.Tensor):
    """A weight that is kept at half its size, as quantised ones are kept in other numbers."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half_ = half

    def __tensor_flatten__(self):
        return ["half_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["half_"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return return_and_correct_aliasing(func, args, kwargs, cls(func(args[0].half_)))
        whole = torch.utils._pytree.tree_map_only(cls, lambda x: 2 * x.half_, (args, kwargs or {}))
        return func(*whole[0], **whole[1])


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        for weight in self.parameters():
            torch.nn.init.normal_(weight, generator=generator)

    def forward(self, x):
        q = x[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        return x + self.down(F.silu(self.up(x)))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_more_than_memory_refuse_their_block(part):
    model = torch.nn.Sequential(Layer(), Layer())
    setattr(model[0].up, part, torch.nn.Parameter(Halved(getattr(model[0].up, part).detach() / 2), requires_grad=False))
    decisions = compiled(model, [torch.randn(2, 1, 8)], passes=["ffn_skip", "dense"], ffn_skip=SKIP)
    assert [(d.kind, d.method) for d in decisions] == [("attention", "dense")] * 2 + [("ffn", None), ("ffn", "ffn_skip")]
    assert "Halved, not a plain tensor" in decisions[2].reason


def test_operands_that_are_more_than_memory_refuse_their_attention():
    q, k, v = inputs()
    decisions = compiled(lambda q, k, v, h: (*two(q, k, v), F.scaled_dot_product_attention(q, h, v)), [q, k, v, Halved(k)])
    assert [d.method for d in decisions] == ["dense", "dense", None] and "Halved" in decisions[2].reason


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_refuse_their_blocks():
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(Layer(), Layer())
    quantization.quantize_(model[0], quantization.Int8WeightOnlyConfig())
    decisions = compiled(model, [torch.randn(2, 1, 8)], passes=["ffn_skip", "dense"], ffn_skip=SKIP)
    assert [(d.kind, d.method) for d in decisions] == [("attention", "dense")] * 2 + [("ffn", None), ("ffn", "ffn_skip")]


@pytest.mark.unforeseen
@pytest.mark.parametrize(("where", "name"), [(feed_forward._Matcher, "_own_norm"), (FfnSkip, "propose")])
def test_what_nobody_foresaw_costs_one_block(monkeypatch, where, name):
    monkeypatch.setattr(where, name, fails_first(getattr(where, name), ZeroDivisionError("by zero")))
    model = torch.nn.Sequential(Layer(), Layer())
    decisions = compiled(model, [torch.randn(2, 1, 8)], passes=["ffn_skip", "dense"], ffn_skip=SKIP)
    assert [(d.kind, d.method) for d in decisions] == [("attention", "dense")] * 2 + [("ffn", None), ("ffn", "ffn_skip")]


@pytest.mark.unforeseen
def test_a_cache_op_called_by_hand_is_left(nothing_unforeseen):
    graph = torch.fx.Graph()
    graph.call_function(cache_ops.store, (), {"key": graph.placeholder("key")})
    from sparsify.matching.cache import find_cache, made_inside

    gm = torch.fx.GraphModule({}, graph)
    assert find_cache(gm) == [] and len(nothing_unforeseen) == 1
    assert made_inside(gm) is None
