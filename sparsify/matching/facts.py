"""Facts about a site that are read off its nodes: layer, strides, and which nodes serve nothing else."""

from __future__ import annotations

import typing
from dataclasses import replace

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max

from sparsify.costs.sizes import Size
from sparsify.graph import compat
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.module_paths import layer_number, module_path
from sparsify.masks import prove
from sparsify.masks.symbolic import plain, scalar, sizes
from sparsify.matching.base import StrideOrder
from sparsify.matching.layouts import STANDARD, arranged
from sparsify.matching.sites import AttentionSite, Source

Heads = tuple[sympy.Expr, ...]  # (batch, heads) where the two may be one dimension


def autocast_to(output: fx.Node, operands: tuple[fx.Node, ...], *products: fx.Node) -> torch.dtype | None:
    """The dtype that attention computes in: its operands' own, or the one that autocast converts them to. None where dtypes differ for
    another reason. products: other results that autocast would have rounded too."""
    dtype = example_tensor(output).dtype
    found = {example_tensor(n).dtype for n in operands}
    if found == {dtype}:
        return dtype
    half = dtype in (torch.float16, torch.bfloat16) and all(example_tensor(n).dtype is dtype for n in products)
    return dtype if half and found <= {torch.float32, dtype} else None


def stride_order(tensor: torch.Tensor, layout: str = STANDARD, heads: Heads = ()) -> StrideOrder:
    """How a [batch, heads, query, dim] value lies in memory; sizes of 1 do not matter. heads: as `layouts.arranged` takes it."""
    shape, strides = shape_and_strides(tensor, layout, heads)
    orders: dict[StrideOrder, tuple[int, ...]] = {"bhqd": (0, 1, 2, 3), "bqhd": (0, 2, 1, 3)}
    for name, order in orders.items():
        # torch writes the strides over a size that might be 0 with Max(1, size)
        for size in (lambda n: n, lambda n: n if n.is_number else typing.cast(sympy.Expr, Max(1, n))):
            expected, running = {}, sympy.Integer(1)
            for dimension in reversed(order):
                expected[dimension] = running
                running = running * size(shape[dimension])
            if all(shape[d] == 1 or sympy.expand(strides[d] - expected[d]) == 0 for d in range(4)):
                return name
    return "other"


def shape_and_strides(tensor: torch.Tensor, layout: str, heads: Heads) -> tuple[tuple[sympy.Basic, ...], tuple[sympy.Basic, ...]]:
    """Of the same memory as [batch, heads, length, dim]. heads: as `layouts.arranged` takes it."""
    strides: tuple[sympy.Basic, ...] = tuple(scalar(s) for s in tensor.stride())
    steps: tuple[sympy.Basic, ...] = ()
    if "n" in layout:
        step = typing.cast(sympy.Expr, strides[layout.index("n")])
        steps = (sympy.expand(sympy.Mul(heads[1], step)), step)
    return arranged(sizes(tensor), layout, heads), arranged(strides, layout, steps)


def layer_of(node: fx.Node) -> tuple[str, int | None]:
    """Path and number of the layer from `nn_module_stack`, the path from the model that was compiled; empty without a stack."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", None
    path = module_path(list(stack.values())[-1][0], compat.frame_scopes())
    return path, layer_number(path)


def only_for(core: tuple[fx.Node, ...], more: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """`core` and those of `more` whose every user is among them, in graph order."""
    covered = set(core)
    grown = True
    while grown:
        grown = False
        for node in more:
            if node not in covered and set(node.users) <= covered:
                covered.add(node)
                grown = True
    return tuple(n for n in core[0].graph.nodes if n in covered)


def missed(site: AttentionSite, reason: str) -> AttentionSite:
    """The site, refused for a reason."""
    return replace(site, near_miss=reason, mask=prove.opaque(reason))


def bare_site(
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    near_miss: str,
    source: Source = "sdpa",
    inputs: tuple[fx.Node, ...] = (),
) -> AttentionSite:
    """The record of an attention that could not be described: sizes as far as they exist, the reason in `near_miss`. inputs: as
    `MaskPredicate.inputs`."""
    tensor = example_tensor(node) if (found := tensor_of(query)) is None else found
    name, layer = layer_of(node)

    def size(operand: fx.Node, dimension: int) -> Size:
        found = tensor_of(operand)
        return plain(sizes(found)[dimension]) if found is not None and found.dim() >= -dimension else 1

    return AttentionSite(
        name=name,
        layer=layer,
        index=0,
        output=node,
        query=query,
        key=key,
        value=value,
        mask_node=mask,
        mask=replace(prove.opaque(near_miss), inputs=inputs),
        batch=size(query, -4),
        query_heads=size(query, -3),
        kv_heads=size(key, -3),
        query_len=size(query, -2),
        key_len=size(key, -2),
        qk_head_dim=size(query, -1),
        v_head_dim=size(value, -1),
        scale=1.0,
        softcap=0.0,
        dropout=0.0,
        dtype=tensor.dtype,
        device=tensor.device,
        needs_grad=False,
        output_stride_order="other",
        source=source,
        near_miss=near_miss,
        covered=(node,),
    )
