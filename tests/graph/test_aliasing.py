"""Which inputs a call writes to, as its schema, its name or its arguments tell."""

from __future__ import annotations

import operator

import torch
from torch import fx

import sparsify.ops.cache as cache_ops
from sparsify.graph.aliasing import written


def call(target, *names, op="call_function", **keywords):
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in (*names, *keywords.values())}
    arguments = {key: nodes[name] for key, name in keywords.items()}
    return [node.name for node in written(graph.create_node(op, target, tuple(nodes[name] for name in names), arguments))]


def test_an_op_writes_to_what_its_schema_says():
    assert call(torch.ops.aten.add_.Tensor, "a", "b") == ["a"]
    assert call(torch.ops.aten.add.out, "a", "b", out="c") == ["c"]
    assert call(torch.ops.aten.add.Tensor, "a", "b") == []


def test_storing_a_token_leaves_the_padding_mask_as_it_is():
    schema = cache_ops.store._schema
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    marked = [argument.name for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
    tensors = [a.name for a in schema.arguments if a.kwarg_only and "Tensor" in str(a.type)]
    found = call(cache_ops.store, *names, **{name: name for name in tensors})
    assert set(found) == set(marked) < {*names, *tensors}


def test_methods_functions_and_operators():
    assert call("mul_", "a", "b", op="call_method") == ["a"]
    assert call("__setitem__", "a", "b", op="call_method") == ["a"]
    assert call("mul", "a", "b", op="call_method") == []
    assert call(operator.setitem, "a", "i", "b") == ["a"]
    assert call(operator.iadd, "a", "b") == ["a"]
    assert call(torch.add, "a", "b", out="c") == ["c"]
    assert call(torch.relu_, "a") == ["a"]
