"""Lets the last rows of an attention site see every key, whatever a method hides from the others: a second attention over those rows.

SCBench's Tri-shape (Li et al., arXiv 2412.10319): sinks and a window for a prompt, and all keys for the rows at its end, which ask the
question. Rows are counted by token, so that the result does not depend on blocks, and every kernel serves them as it serves any chunk.

In a padded batch each row's last tokens are elsewhere. There keys are put in the order hidden, visible: then the last tokens of each
row are its last places, and causality among places is causality among tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.matching.sites import AttentionSite
from sparsify.rewriting.editor import Editor, MaskOperands, attention_call, values


def with_last_rows(editor: Editor, site: AttentionSite, output: fx.Node, rows: int) -> fx.Node:
    """The attention of a causal site with its last rows computed over all keys that the mask shows.

    Args:
        output: node of what a method computes, [batch, query_heads, query_len, v_head_dim].
        rows: how many of each batch row; where keys are padding, its last visible ones.

    Returns:
        a node of output's shape. Fewer rows than there are: all of them; rows that are padding stay as they are.
    """
    if site.mask.padding is not None:
        return _by_token(editor, site, output, rows)
    mask, last = editor.mask_operands(site), (Ellipsis, slice(-rows, None), slice(None))
    query = editor.call(operator.getitem, site.query, last)
    if mask.query_start is not None:
        # validation runs on fewer rows than `rows`, too, where the graph has a number of them that does not vary
        before = editor.call(torch.sym_max, editor.call(operator.sub, editor.method("size", site.query, 2), rows), 0)
        mask = dataclasses.replace(mask, query_start=editor.call(operator.add, mask.query_start, before))

    def cut(node: fx.Node | None) -> fx.Node | None:
        by_row = node is not None and values(node).dim() > 1 and values(node).shape[-2] != 1
        return editor.call(operator.getitem, node, last) if by_row else node

    bias = tuple(dataclasses.replace(one, node=cut(one.node)) for one in site.bias)
    sinks = site.sink_logits if site.sink_logits is None or values(site.sink_logits).dim() != 4 else cut(site.sink_logits)
    narrow = dataclasses.replace(site, query=query, query_len=rows, bias=bias, sink_logits=sinks)
    return editor.call(torch.slice_scatter, output, attention_call(editor, narrow, mask=mask), 2, -rows)


def _by_token(editor: Editor, site: AttentionSite, output: fx.Node, rows: int) -> fx.Node:
    places = _places(editor, site, rows)
    narrow = dataclasses.replace(
        site,
        query=_rows_at(editor, site.query, places.rows),
        key=_rows_at(editor, site.key, places.keys),
        value=_rows_at(editor, site.value, places.keys),
        query_len=rows,
        empty_rows="zero",
    )
    dense = attention_call(editor, narrow, mask=MaskOperands(places.flags, None, None, True, 0))
    kept = editor.call(torch.where, places.known, dense, _rows_at(editor, output, places.rows))
    index = _index(editor, output, places.rows)
    if site.output_stride_order == "bhqd":
        return editor.method("scatter", output, 2, index, kept)
    whole, index, kept = (editor.method("transpose", node, 1, 2) for node in (output, index, kept))
    return editor.method("transpose", editor.method("scatter", whole, 1, index, kept), 1, 2)


def _rows_at(editor: Editor, tensor: fx.Node, places: fx.Node) -> fx.Node:
    """Rows [batch, heads, count, dim] of a tensor [batch, heads, length, dim]."""
    return editor.method("gather", tensor, 2, _index(editor, tensor, places))


def _index(editor: Editor, tensor: fx.Node, places: fx.Node) -> fx.Node:
    # take_along_dim would make numbers of symbolic sizes
    batch, heads, dim = (editor.length(tensor, at) for at in (0, 1, 3))
    return editor.method("expand", places, batch, heads, -1, dim)


@dataclass(frozen=True)
class _Places:
    """Where each batch row's last tokens are.

    keys: int64 [batch or 1, 1, key_len, 1], an order of the keys: first those that are hidden.
    flags: uint8 [batch or 1, key_len], of keys in this order.
    rows: int64 [batch or 1, 1, rows, 1]: query rows; those that are no tokens come first.
    known: bool, of that shape: whether it is a token.
    """

    keys: fx.Node
    flags: fx.Node
    rows: fx.Node
    known: fx.Node


def _places(editor: Editor, site: AttentionSite, rows: int) -> _Places:
    """Layers that read the same mask share these."""
    mask = editor.mask_operands(site)
    assert mask.key_flags is not None
    size = lambda node: editor.method("size", node, 2)
    wide = lambda node: editor.call(operator.getitem, node, (slice(None), None, slice(None), None))
    places = lambda node: editor.call(torch.arange, size(node), device=values(node).device)

    def shared(name: str, make: Callable[[], fx.Node]) -> fx.Node:
        return editor.shared(("last tokens", name, mask.key_flags, mask.query_start, rows, str(site.query_len)), make)

    def visible_keys() -> fx.Node:
        seen = editor.call(operator.ne, editor.call(operator.and_, mask.key_flags, 1), 0)
        if mask.query_start is None:
            return seen
        end = editor.call(operator.add, mask.query_start, size(site.query))
        return editor.call(operator.and_, seen, editor.call(operator.lt, places(site.key), end))

    def visible_rows() -> fx.Node:
        start = editor.call(operator.sub, size(site.key), size(site.query)) if mask.query_start is None else mask.query_start
        own = editor.call(operator.add, places(site.query), start)
        inside = editor.call(operator.and_, editor.call(operator.ge, own, 0), editor.call(operator.lt, own, size(site.key)))
        place = editor.method("clamp", own, 0, editor.call(operator.sub, size(site.key), 1))
        return editor.call(operator.and_, editor.call(operator.getitem, visible, (slice(None), place)), inside)

    visible = shared("visible", visible_keys)
    order = shared("order", lambda: editor.call(torch.argsort, visible, dim=-1, stable=True))
    flags = shared("flags", lambda: editor.method("gather", editor.method("to", visible, torch.uint8), -1, order))
    tokens = shared("tokens", visible_rows)
    ranked = shared("ranked", lambda: editor.call(torch.argsort, tokens, dim=-1, stable=True))
    last = shared("rows", lambda: editor.call(operator.getitem, ranked, (slice(None), slice(-rows, None))))
    known = shared("known", lambda: editor.method("gather", tokens, -1, last))
    return _Places(wide(order), flags, wide(last), wide(known))
