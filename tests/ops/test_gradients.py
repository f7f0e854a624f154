"""Gradients are torch's: where one may pass nothing of ours is put, however the program asks for it, and an op of ours that meets one
raises instead of giving zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import api
from sparsify.errors import UnsupportedError
from sparsify.ops import attention as attention_ops
from sparsify.ops import cache, feed_forward
from sparsify.ops.attention import AttentionCall
from tests.support.harness import strict

# torch's own forward derivatives are scripted
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning")


def window() -> torch.Tensor:
    return torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 6, 4, generator=generator) for _ in range(3)]


def written_out(q, k, v):
    return (q @ k.transpose(-1, -2) * 0.5).masked_fill(~window(), float("-inf")).softmax(-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window())


def backward(attend, q, k, v):
    out, pull = vjp(attend, q, k, v)
    return pull(out)


def turned_on(attend, q, k, v):
    with torch.no_grad(), torch.enable_grad():
        return attend(q, k, v)


def turned_on_by_a_call(attend, q, k, v):
    torch.set_grad_enabled(True)
    out = attend(q, k, v)
    torch.set_grad_enabled(False)
    return out


def inference_turned_off(attend, q, k, v):
    with torch.inference_mode(False):
        return attend(q, k, v)


def within_no_grad(attend, q, k, v):
    with torch.no_grad():
        return attend(q, k, v)


def in_inference(attend, q, k, v):
    with torch.inference_mode():
        return attend(q, k, v).clone()


FOLLOWED = {
    "grad": lambda attend, q, k, v: grad(lambda x: attend(x, k, v).square().sum())(q),
    "grad of what does not reach attention": lambda attend, q, k, v: grad(lambda x: (x * attend(q, k, v)).sum())(q),
    "vjp": backward,
    "vmap": lambda attend, q, k, v: vmap(lambda x: attend(x, k, v))(torch.stack([q, v])),
    "vmap of grad": lambda attend, q, k, v: vmap(grad(lambda x: attend(x, k, v).sum()))(torch.stack([q, v])),
}
FORWARD = {
    "jvp": lambda attend, q, k, v: jvp(lambda x: attend(x, k, v), (q,), (v,)),
    "hessian": lambda attend, q, k, v: hessian(lambda x: attend(x, k[:, :1], v[:, :1]).sum())(q[:, :1]),
}


def compiled(function, *inputs):
    """Result and methods of one compilation."""
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        result = torch.compile(function, backend="sparsify", options=strict(exact=True))(*inputs)
    return result, [d.method for plan in plans for d in plan.decisions]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("attend", "transform", "mode"),
    [
        *((fused, name, torch.no_grad) for name in FOLLOWED),
        *((written_out, name, torch.no_grad) for name in (*FOLLOWED, *FORWARD)),
        (fused, "grad", torch.enable_grad),
        (written_out, "vmap", torch.enable_grad),
    ],
)
@pytest.mark.samples(5)
def test_within_transforms_nothing_is_rewritten(attend, transform, mode):
    function = (FOLLOWED | FORWARD)[transform]
    with mode():
        want = function(attend, *operands())
        got, methods = compiled(lambda q, k, v: function(attend, q, k, v), *operands())
    assert methods and not any(methods)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attend", [fused, written_out])
def test_beside_a_transform_sites_are_rewritten(attend):
    def both(q, k, v):
        slope = grad(lambda x: attend(x, k, v).sum())(q)
        return slope, attend(slope, k, v)

    with torch.no_grad():
        want = both(*operands())
        got, methods = compiled(both, *operands())
    assert [m is not None for m in methods] == [False, True]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attend", [fused, written_out])
@pytest.mark.parametrize("turn", [turned_on, turned_on_by_a_call, inference_turned_off])
def test_a_grad_mode_that_the_graph_turns_on(turn, attend):
    """Operands that need none are none of autograd's business."""
    for needs in (True, False):
        q, k, v = operands()
        q.requires_grad_(needs)
        with torch.no_grad():
            got, methods = compiled(lambda q, k, v: turn(attend, q, k, v), q, k, v)
        assert [m is None for m in methods] == [needs] and got.requires_grad is needs
        if needs:
            (slope,) = torch.autograd.grad(got.sum(), q)
            torch.testing.assert_close(slope, torch.autograd.grad(attend(q, k, v).sum(), q)[0])


@pytest.mark.parametrize("attend", [fused, written_out])
@pytest.mark.parametrize("turn", [within_no_grad, in_inference])
def test_a_grad_mode_that_the_graph_turns_off(turn, attend):
    q, k, v = operands()
    q.requires_grad_()
    got, methods = compiled(lambda q, k, v: turn(attend, q, k, v), q, k, v)
    assert None not in methods and len(methods) == 1 and not got.requires_grad
    torch.testing.assert_close(got, attend(q, k, v).detach())


def test_gradients_of_a_bias_alone():
    bias = torch.zeros(1, 2, 1, 6, requires_grad=True)

    def attend(q, k, v, bias):
        return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v

    got, methods = compiled(attend, *operands(), bias)
    assert methods == [None] and got.requires_grad


def test_where_autograd_stops_halfway():
    """Weights that need no gradient times values that need none, under a grad mode that queries would need."""

    def attend(q, k, v):
        with torch.no_grad():
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v

    q, k, v = operands()
    got, methods = compiled(attend, q.requires_grad_(), k, v)
    assert methods == [None] and not got.requires_grad


# -- the net under the matchers --------------------------------------------------------------------------------------------------------


def attention(q, k, v):
    return AttentionCall.op()(q, k, v, scale=0.5, causal=True, version=AttentionCall.VERSION)[0]


def test_an_op_raises_for_what_needs_gradients():
    q, k, v = operands()
    v.requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradient"):
        attention(q, k, v)
    with torch.no_grad():
        attention(q, k, v)
    attention(q, k, v.detach())
    with forward_ad.dual_level():
        attention(q, k, v.detach())
        with pytest.raises(UnsupportedError, match="tangent"):
            attention(forward_ad.make_dual(q, q), k, v.detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_op_in_a_compiled_function_raises_for_what_needs_gradients(backend):
    q, k, v = operands()
    torch._dynamo.reset()
    function = torch.compile(attention, backend=backend)
    with pytest.raises(Exception, match="no gradient"):
        function(q.requires_grad_(), k, v)
    torch._dynamo.reset()
    with torch.no_grad():
        assert function(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(lambda x: f(x).sum()),
        vmap,
        lambda f: lambda x: vjp(f, x),
        lambda f: lambda x: jvp(f, (x,), (x,)),
        lambda f: grad(lambda x: (x * f(torch.zeros(1, 2, 6, 4))).sum()),
    ],
)
def test_an_op_raises_within_transforms(transform):
    q, k, v = operands()
    with pytest.raises(UnsupportedError, match="vmap"), torch.no_grad():
        transform(lambda x: attention(x if x.dim() == 4 else x[None], k, v))(q)


def test_every_op_refuses_transforms():
    for module in (attention_ops, feed_forward, cache):
        for op in vars(module).values():
            if isinstance(op, torch._ops.OpOverload):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "FuncTorchDynamicLayerFrontMode"), op.name()
