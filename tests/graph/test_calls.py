"""Calls are bound to signatures as torch binds them; an argument that the signature does not name is refused, never dropped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph.calls import Unbound, bind

X = torch.zeros(2, 3)


def call(target, *args, **kwargs) -> fx.Node:
    """A call in a graph; tensors among its arguments become nodes with example values."""
    graph = fx.Graph()

    def node(value):
        if not isinstance(value, torch.Tensor):
            return value
        made = graph.placeholder("x")
        made.meta["example_value"] = value
        return made

    args, kwargs = torch.utils._pytree.tree_map(node, (args, kwargs))
    made = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)
    made.meta["example_value"] = X
    return made


@pytest.mark.parametrize(
    "node",
    [
        call(torch.softmax, X, -1),
        call(torch.softmax, X, dim=-1),
        call(torch.softmax, input=X, axis=-1),
        call("softmax", X, -1),
        call(F.softmax, X, dim=-1, dtype=None),
    ],
)
def test_arguments_by_position_keyword_and_numpys_names(node):
    bound = bind(node, "input, dim: int, dtype=None")
    assert (bound.dim, bound.dtype) == (-1, None) and bound.input.op == "placeholder"


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (call(F.softmax, X, -1, 3), "3 arguments by position"),
        (call(F.softmax, X, -1, _stacklevel=3), "the argument _stacklevel"),
        (call(F.softmax, X, -1, dim=-1), "the argument dim twice"),
        (call(F.softmax, X, -1, axis=0), "the argument axis twice"),
        (call(F.softmax, X), "no argument dim"),
        (call(F.softmax, X, X), "an argument dim that is no int"),
        (call(F.softmax, X, True), "an argument dim that is no int"),
    ],
)
def test_what_is_not_known_is_refused(node, why):
    with pytest.raises(Unbound, match=why):
        bind(node, "input, dim: int")


def test_the_first_signature_that_fits_is_taken():
    forms = "input, dim: int, keepdim: bool = False", "input, other: tensor", "input"
    assert bind(call(torch.max, X, 1, keepdims=True), *forms).keepdim is True
    assert bind(call(torch.max, X, X), *forms).other.op == "placeholder"
    assert vars(bind(call(torch.max, X), *forms)).keys() == {"input"}
    with pytest.raises(Unbound, match="3 arguments by position"):
        bind(call(torch.max, X, X, True), "input, other: tensor", "input")


@pytest.mark.parametrize("node", [call("view", X, 3, 2), call("view", X, (3, 2)), call(torch.reshape, X, shape=[3, 2])])
def test_sizes_one_by_one_or_as_one_sequence(node):
    assert bind(node, "input, *shape").shape == (3, 2)


def test_other_arguments_follow_sizes_by_keyword():
    node = call("new_empty", X, 3, 2, dtype=torch.float64)
    assert bind(node, "input, *size, dtype: dtype = None").dtype is torch.float64
    with pytest.raises(Unbound, match="the argument dtype"):
        bind(node, "input, *size")
    with pytest.raises(Unbound, match="no argument size"):
        bind(call("new_empty", X), "input, *size")


def test_sizes_that_a_node_computes_are_refused():
    shape = call("size", X)
    shape.meta["example_value"] = X.shape
    node = call("view", X)
    node.args = (*node.args, shape)
    with pytest.raises(Unbound, match="another node"):
        bind(node, "input, *shape")
