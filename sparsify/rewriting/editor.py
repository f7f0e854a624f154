"""The only code that changes a graph: inserts nodes before a site, replaces the site's output, erases nodes that became unused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from sparsify.costs.sizes import Size
from sparsify.errors import RewriteError
from sparsify.graph.aliasing import written
from sparsify.masks.predicate import Leaf
from sparsify.masks.symbolic import COMPUTED, FURTHEST, find_shape_env
from sparsify.matching.base import Site
from sparsify.matching.facts import shape_and_strides
from sparsify.matching.layouts import IN_ORDER, Layouts, back, order
from sparsify.matching.sites import AttentionSite, ScoreBias
from sparsify.ops import operands
from sparsify.ops.attention import AttentionCall
from sparsify.ops.call import OpCall
from sparsify.ops.head_numbers import head_numbers
from sparsify.ops.library import NAMESPACE
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.sparse_attention import SparseAttentionCall

_MADE_BY = ("nn_module_stack", "source_fn_stack", "stack_trace")  # what Dynamo notes of a node's origin

AnySite = TypeVar("AnySite", bound=Site)


@dataclass(frozen=True)
class MaskOperands:
    """The mask's clauses as operands of the attention ops.

    key_flags, segments, query_start: nodes, as `sparsify.ops.attention` describes these operands; None without the clause.
    causal: whether the mask is causal.
    window: tokens that a row sees; 0 without a window.
    """

    key_flags: fx.Node | None
    segments: fx.Node | None
    query_start: fx.Node | None
    causal: bool
    window: int


@dataclass
class Editor:
    """Edits one graph.

    It emits torch functions, tensor methods and operators only: AOTAutograd's cache declines graphs that call anything else.

    inserted: nodes inserted so far.
    replaced: replaced outputs, and what replaced them.
    superseded: names of erased mutating calls whose effect inserted nodes have.
    sequence: name of the group of processes among which the text is divided, of which the graph has a part; empty: it has all of it.
    """

    graph: fx.Graph
    inserted: list[fx.Node] = field(default_factory=list)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    superseded: set[str] = field(default_factory=set)
    sequence: str = ""
    _shared: dict[Any, fx.Node] = field(default_factory=dict)
    _before: fx.Node | None = None  # where nodes go
    _output: fx.Node | None = None  # the site's output

    @functools.cached_property
    def shape_env(self) -> Any | None:
        return find_shape_env(self.graph)

    def move_to(self, site: Site) -> Editor:
        """Nodes are inserted before this site from now on."""
        return self.move_before(site.output)

    def move_before(self, node: fx.Node) -> Editor:
        """Nodes are inserted before this one from now on, as parts of the module that it belongs to."""
        self._before = self._output = node
        return self

    def move_after(self, node: fx.Node) -> Editor:
        """Nodes are inserted after this one, a tensor, from now on, and after the inputs of the graph."""
        self._before, self._output = node.next, node
        while self._before.op == "placeholder":
            self._before = self._before.next
        return self

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call_function node before the current site; its example value is computed on fake tensors."""
        return self._insert("call_function", target, args, kwargs)

    def emit(self, call: OpCall) -> fx.Node:
        """Inserts a call of one of sparsify's ops; the record holds nodes in place of tensors."""
        if self.sequence and isinstance(call, AttentionCall | SparseAttentionCall | PatternAttentionCall):
            call = dataclasses.replace(call, sequence=self.sequence)
        args, kwargs = call.arguments()
        return self.call(call.op(), *args, **kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call_method node before the current site."""
        return self._insert("call_method", name, args, kwargs)

    def _insert(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if self._before is None or self._output is None:
            raise RewriteError("the editor has no position", hint="call editor.move_to(site) first")
        # a site's operand may be an earlier site's output: left alone, the old attention would stay alive and be read
        args, kwargs = map_arg((args, kwargs), self.current)
        with self.graph.inserting_before(self._before):
            node = self.graph.create_node(kind, target, args, kwargs)
        # the graph's own fake mode: the tracing context may hold another one by now
        fake_mode = getattr(self._output.meta["example_value"], "fake_mode", None)
        if getattr(target, "namespace", "") == NAMESPACE:
            operands.check(target, values(args), values(kwargs), self.shape_env)
        function = target if kind == "call_function" else lambda self_, *a, **k: getattr(self_, target)(*a, **k)
        # sites lie where no gradient is followed, whatever mode the graph is compiled in
        with fake_mode or contextlib.nullcontext(), torch.no_grad():
            node.meta["example_value"] = function(*values(args), **values(kwargs))
        for key in _MADE_BY:
            if key in self._output.meta:
                node.meta[key] = self._output.meta[key]
        self.inserted.append(node)
        return node

    def converted(self, site: AnySite) -> AnySite:
        """The site with its operands as methods take them: in its dtype, as autocast converts them for attention, and in the standard order
        of dimensions."""
        names = [n for n in site.converted_operands if values(getattr(site, n)).dtype != site.dtype]
        self.move_to(site)
        changed: dict[str, Any] = {n: self.method("to", getattr(site, n), site.dtype) for n in names}
        if site.layouts != IN_ORDER:
            changed |= self.arranged(dataclasses.replace(site, **changed))
            changed["layouts"] = Layouts(output=site.layouts.output)
        return dataclasses.replace(site, **changed)

    def arranged(self, site: Site) -> dict[str, fx.Node]:
        """Query, key and value as [batch, heads, length, dim]; the editor stands at the site."""
        found: dict[str, fx.Node] = {}
        for name in ("query", "key", "value"):
            node, layout = getattr(site, name), getattr(site.layouts, name)
            if "n" in layout:
                heads = tuple(self.size(site, number) for number in site.batch_and_heads)
                node = self.method("unflatten", node, layout.index("n"), heads)
            found[name] = node if order(layout) == (0, 1, 2, 3) else self.method("permute", node, *order(layout))
        return found

    def laid_out(self, node: fx.Node, layout: str) -> fx.Node:
        """A value [batch, heads, length, dim] in another layout."""
        if back(layout) != (0, 1, 2, 3):
            node = self.method("permute", node, *back(layout))
        return self.method("flatten", node, layout.index("n"), layout.index("n") + 1) if "n" in layout else node

    def head_numbers(self, site: Site, option: str) -> fx.Node | None:
        """The graph's operand that holds a method's option for each query head of a site; None where there is none: it is a constant."""
        for node in self.graph.nodes:
            if node.target is head_numbers and node.args[1:] == (site.name, option):
                return node.args[0]
        return None

    def items(self, pair: fx.Node, count: int) -> list[fx.Node]:
        """The elements of a node that returns a tuple."""
        return [self.call(operator.getitem, pair, i) for i in range(count)]

    def repeated(self, end: fx.Node, start: fx.Node, value: fx.Node) -> fx.Node:
        """Inserts once more what computes `end` from `start`, reading `value` in its place; `a += b` becomes a new tensor.

        Raises:
            RewriteError: another call on the way writes in place.
        """
        between = _nodes_between(start, end)
        copies = {start: value}
        for node in (n for n in self.graph.nodes if n in between):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            if node.target is operator.iadd:
                copies[node] = self.call(torch.add, *args, **kwargs)
            elif mutates(node):
                raise RewriteError(f"{node.name} writes in place")
            else:
                copies[node] = self._insert(node.op, node.target, args, kwargs)
        return copies[end]

    def replace(self, site: Site, value: fx.Node) -> None:
        """Replaces every use of the site's output by `value`, converted to the strides that the graph expects."""
        old, new = values(site.output), values(value)
        if site.output_stride_order == "bhqd" and not new.is_contiguous():
            value = self.method("contiguous", value)
        elif site.output_stride_order == "bqhd" and not new.transpose(1, 2).is_contiguous():
            value = self.method("transpose", self.method("contiguous", self.method("transpose", value, 1, 2)), 1, 2)
        elif site.output_stride_order == "other":
            told = shape_and_strides(old, site.layouts.output, site.batch_and_heads)
            shape, strides = (tuple(self.size(site, n) for n in numbers) for numbers in told)
            empty = self.call(torch.empty_strided, shape, strides, dtype=old.dtype, device=old.device)
            value = self.method("copy_", empty, value)
        value = self.laid_out(value, site.layouts.output)
        site.output.replace_all_uses_with(value)
        self.replaced[site.output] = value

    def substitute(self, node: fx.Node, value: fx.Node) -> None:
        """Replaces every use of a node by a value of the same shape and strides, and erases what nothing uses any more."""
        node.replace_all_uses_with(value)
        self.replaced[node] = value
        self._erase_upwards(node)

    def supersede(self, node: fx.Node) -> None:
        """Erases a mutating call whose effect an inserted node has, and tells verification that no mutation is lost."""
        self.superseded.add(node.name)
        self.graph.erase_node(node)

    def mask_operands(self, site: AttentionSite, *, sinks: int = 0) -> MaskOperands:
        """The site's proved clauses as operands. With sinks > 0 and a padding clause, the first `sinks` visible keys of each
        batch row carry the sink bit; with documents, those of each document. Layers that read the same mask share these nodes."""
        mask, padding, documents = site.mask, site.mask.padding, site.mask.documents
        flags = segments = None
        if padding is not None:
            key = ("flags", padding, sinks, str(site.key_len), str(site.batch))
            flags = self.shared(key, lambda: self._key_flags(self._rows(site, padding), padding, sinks))
        if documents is not None:
            key = ("segments", documents, str(site.key_len), str(site.batch))
            segments = self.shared(key, lambda: self._segments(self._rows(site, documents)))
        if documents is not None and sinks:
            key, plain = ("document sinks", padding, documents, sinks, str(site.key_len), str(site.batch)), segments
            shown = None if padding is None else self.call(getattr(operator, padding.relation), self._rows(site, padding), padding.number)
            flags = self.shared(key, lambda: self._document_sinks(plain, shown, sinks))
        if mask.rows and padding is not None:  # equal numbers are tokens here, since keys that are none are hidden
            key = ("rows", padding, str(site.key_len), str(site.batch))
            segments = self.shared(key, lambda: self._segments(self._key_flags(self._rows(site, padding), padding, 0)))
        start = None
        if not mask.query_start.bottom_right:
            start = self.shared(("start", mask.query_start), lambda: self._query_start(site))
        return MaskOperands(flags, segments, start, mask.causal, mask.window or 0)

    def shared(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        """The node that all sites of this graph share under `key`; the first site makes it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def share(self, key: Any, node: fx.Node) -> None:
        """Sets the node that later sites find under `key`."""
        self._shared[key] = node

    def current(self, node: fx.Node) -> fx.Node:
        """The node that replaced this one, or itself: a site's operand may be an earlier site's output."""
        return self.replaced.get(node, node)

    def _rows(self, site: AttentionSite, leaf: Leaf) -> fx.Node:
        """leaf[:, shift : shift + key_len] as [batch, key_len]."""
        begin, key_len = self.size(site, leaf.shift), self.length(site.key, 2)
        if begin == 0:
            end = key_len
        else:
            end = begin + key_len if isinstance(begin, int) and isinstance(key_len, int) else self.call(operator.add, begin, key_len)
        whole = self._snapshot(leaf.node)
        rank = values(whole).dim()
        if rank != 2:
            whole = self.method("unsqueeze", whole, 0) if rank == 1 else self.method("flatten", whole, 1)
        part = self.call(operator.getitem, whole, (slice(None), slice(begin, end)))
        return self.method("expand", part, self.length(site.query, 0), -1)

    def _snapshot(self, leaf: fx.Node) -> fx.Node:
        """A copy of a mask's leaf, taken where the leaf is defined.

        A cache moves its length counter before the layer's attention runs, while the mask read it at the top of the graph.
        """

        def copy() -> fx.Node:
            after = leaf
            while leaf.op == "placeholder" and after.next.op == "placeholder":
                after = after.next
            site, self._before = self._before, after.next
            try:
                node = self.method("clone", leaf)
            finally:
                self._before = site
            for key in _MADE_BY:  # no part of the site's layer, which runs later
                node.meta.pop(key, None)
                if key in leaf.meta:
                    node.meta[key] = leaf.meta[key]
            return node

        return self.shared(("snapshot", leaf), copy)

    def _key_flags(self, rows: fx.Node, leaf: Leaf, sinks: int) -> fx.Node:
        """uint8 [batch, key_len]: bit 0 where `rows` compares as the leaf says, bit 1 on the first `sinks` of those."""
        visible = self.call(getattr(operator, leaf.relation), rows, leaf.number)
        flags = self.method("to", visible, torch.uint8)
        if sinks:
            first = self.call(operator.le, self.method("cumsum", visible, -1), sinks)
            first = self.method("to", self.call(operator.and_, visible, first), torch.uint8)
            flags = self.call(operator.add, flags, self.call(operator.mul, first, 2))
        return flags

    def _document_sinks(self, segments: fx.Node | None, shown: fx.Node | None, sinks: int) -> fx.Node:
        """uint8 [batch, key_len]: bit 0 on keys that are `shown` (None: all), bit 1 on the first `sinks` of those in each document.

        Keys are sorted by document, so that a key's rank is counted from where its document begins.
        """
        assert segments is not None
        shown = self.call(torch.ones_like, segments, dtype=torch.bool) if shown is None else shown
        ordered = self.call(torch.sort, segments, dim=-1, stable=True)
        documents, order = (self.call(operator.getitem, ordered, part) for part in (0, 1))
        counted = self.method("to", self.method("gather", shown, -1, order), torch.int32)
        rank = self.method("cumsum", counted, -1)
        first = self.call(torch.searchsorted, documents, documents)  # where the key's document begins
        before = self.method("gather", self.call(operator.sub, rank, counted), -1, first)
        first_ones = self.call(operator.le, self.call(operator.sub, rank, before), sinks)
        sink = self.method("scatter", self.call(torch.zeros_like, shown), -1, order, first_ones)
        flags = self.method("to", self.call(operator.and_, shown, sink), torch.uint8)
        return self.call(operator.add, self.method("to", shown, torch.uint8), self.call(operator.mul, flags, 2))

    def _segments(self, rows: fx.Node) -> fx.Node:
        """int32 [batch, key_len], equal where `rows` is: 64-bit ids become ranks in their row, since a cast could make two equal."""
        if values(rows).dtype.itemsize <= 4:
            return self.method("to", rows, torch.int32)
        rows = self.method("contiguous", rows)
        ordered = self.call(operator.getitem, self.method("sort", rows, -1), 0)
        return self.call(torch.searchsorted, ordered, rows, out_int32=True)

    def _query_start(self, site: AttentionSite) -> fx.Node:
        """int64 []: kernels count in 32 bits, and beyond `FURTHEST` no position is another's neighbour."""
        start = site.mask.query_start
        constant = 0 if start.constant is None else self.size(site, start.constant)
        if start.leaf is None and isinstance(constant, int):
            constant = max(-FURTHEST, min(constant, FURTHEST))
            return self.call(torch.full, (), constant, dtype=torch.int64, device=values(site.query).device)
        if start.leaf is None:
            node = self.call(torch.full, (), constant, dtype=torch.int64, device=values(site.query).device)
        else:
            node = self.method("to", self.method("reshape", self._snapshot(start.leaf), ()), torch.int64)
            node = node if start.constant is None else self.call(operator.add, node, constant)
        return self.method("clamp", node, -FURTHEST, FURTHEST)

    def length(self, node: fx.Node, dim: int) -> int | fx.Node:
        """The size of one dimension: an int, or a node that computes it."""
        size = values(node).shape[dim]
        return size if isinstance(size, int) else self.method("size", node, dim)

    def size(self, site: Site, expr: Size | sympy.Basic) -> int | fx.Node:
        """An int, or a node that computes an expression over symbolic sizes.

        Raises:
            RewriteError: a symbol of the expression is the size of nothing before the site.
        """
        if isinstance(expr, int | sympy.Integer):
            return int(expr)
        found = self._size_node(expr)
        if found is not None:
            return found
        if expr.func not in COMPUTED:
            raise RewriteError(f"no node holds the size {expr}", where=site.name)
        operands = [self.size(site, part) for part in ([expr.base] * int(expr.exp) if isinstance(expr, sympy.Pow) else expr.args)]
        result = operands[0]
        for operand in operands[1:]:
            result = self.call(COMPUTED[expr.func], result, operand)
        return result

    def _size_node(self, expr: sympy.Basic) -> fx.Node | None:
        """The node of a size, or of one dimension of a tensor, before the current position."""
        for node in self.graph.nodes:
            if node is self._before:
                return None
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and sympy.expand(value.node.expr - expr) == 0:
                return node
            if isinstance(value, torch.Tensor) and expr.is_Symbol:
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == expr:
                        return self.method("size", node, dim)
        return None

    def erase_orphans(self, sites: Iterable[Site]) -> None:
        """Erases replaced outputs and all nodes that nothing uses any more.

        Other mutating calls and graph inputs stay: a cache update has no user and must survive.
        """
        for site in sites:
            own = {site.output, *site.covered}
            for node in sorted(own, reverse=True):  # a site's own nodes may scale or mask in place: last first
                if not node._erased and not node.users:
                    if mutates(node):
                        self.superseded.add(node.name)
                    self._erase_upwards(node)

    def _erase_upwards(self, node: fx.Node) -> None:
        pending = list(node.all_input_nodes)
        self.graph.erase_node(node)
        while pending:
            node = pending.pop()
            if node._erased or node.users or node.op in ("placeholder", "output") or mutates(node):
                continue
            pending.extend(node.all_input_nodes)
            self.graph.erase_node(node)


def _nodes_between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """The nodes that `end` is computed by from `start`: `end` itself, and without `start`."""
    reached, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if node is not end:
            pending += [user for user in node.users if user not in reached]
            reached.update(node.users)
    found, pending = {end}, [end]
    while pending:
        earlier = [n for n in pending.pop().all_input_nodes if n in reached and n not in found and n is not start]
        found.update(earlier)
        pending += earlier
    return found


def values(tree: Any) -> Any:
    """The tree with nodes replaced by their example values."""
    return map_arg(tree, lambda node: node.meta["example_value"])


def mutates(node: fx.Node) -> bool:
    """Whether a node may write to one of its inputs. Unknown callables count as mutating."""
    return node.op == "call_module" or bool(written(node))


def _bias(editor: Editor, site: AttentionSite, biases: Iterable[ScoreBias]) -> fx.Node | None:
    """The sum of what is added, [batch or 1, query_heads or 1, query_len or 1, key_len]."""
    total = None
    for one in biases:
        bias = one.node
        if one.flat:
            rows = 1 if values(bias).shape[1] == 1 else editor.length(site.query, 2)
            bias = editor.method("reshape", bias, editor.length(site.query, 0), editor.length(site.query, 1), rows, -1)
        else:
            for _ in range(4 - values(bias).dim()):
                bias = editor.method("unsqueeze", bias, 0)
        bias = bias if one.scale == 1.0 else editor.call(operator.mul, bias, one.scale)
        total = bias if total is None else editor.call(operator.add, total, bias)
    return total


def empty_row_operands(editor: Editor, site: AttentionSite, bias: fx.Node | None = None) -> dict[str, Any]:
    """Operands of the attention ops that describe rows without a visible key; empty where such rows are 0 or do not exist."""
    if site.empty_rows in ("impossible", "zero"):
        return {}
    if site.empty_rows == "nan":
        return {"empty_rows": "nan"}
    found: dict[str, Any] = {"empty_rows": site.empty_rows, "lowest": site.lowest}
    reaching = [one for one in site.bias if one.on_hidden]
    if reaching:
        found["hidden_bias"] = bias if len(reaching) == len(site.bias) else _bias(editor, site, reaching)
    return found


def _with_sinks(editor: Editor, output: fx.Node, lse: fx.Node, sinks: fx.Node | None) -> fx.Node:
    """Attention with one more logit for each row, from the output and the LSE without it: `matching.sinks` says why."""
    share = editor.call(torch.sigmoid, editor.call(operator.sub, editor.method("unsqueeze", lse, -1), sinks))
    return editor.method("to", editor.call(operator.mul, output, share), values(output).dtype)


def attention_call(
    editor: Editor,
    site: AttentionSite,
    *,
    sinks: int = 0,
    windows: tuple[int, ...] | None = None,
    blocks: tuple[fx.Node, fx.Node] | None = None,
    block_size: int = 128,
    mask: MaskOperands | None = None,
) -> fx.Node:
    """Inserts `sparsify::attention` for a site.

    Args:
        sinks: first visible tokens of each row that windows do not hide.
        windows: replaces the mask's own window: one number for all heads or one per query head, 0 for none.
        blocks: nodes of block_counts and block_indices.
        block_size: tokens per block.
        mask: the clauses as operands, where they are not as the site has them.

    Returns:
        the node of the output.
    """
    mask = editor.mask_operands(site, sinks=sinks) if mask is None else mask
    own = (mask.window,) if mask.window else ()
    slopes = site.alibi_slopes
    if slopes is not None and values(slopes).dim() == 1:
        slopes = editor.method("unsqueeze", slopes, 0)  # one row of slopes serves every batch row
    bias = _bias(editor, site, site.bias)
    sink_column = site.sink_logits is not None and values(site.sink_logits).dim() == 4
    call = AttentionCall.bind(
        site.query,
        site.key,
        site.value,
        key_flags=mask.key_flags,
        segments=mask.segments,
        query_start=mask.query_start,
        block_counts=blocks[0] if blocks else None,
        block_indices=blocks[1] if blocks else None,
        sink_logits=None if sink_column else site.sink_logits,
        alibi_slopes=slopes,
        bias=bias,
        scale=site.scale,
        causal=mask.causal,
        windows=own if windows is None else windows,
        sinks=sinks,
        softcap=site.softcap,
        block_size=block_size,
        seq_major=site.output_stride_order != "bhqd",
        **empty_row_operands(editor, site, bias),
    )
    if not sink_column:
        return editor.items(editor.emit(call), 1)[0]
    output, lse = editor.items(editor.emit(call), 2)
    return _with_sinks(editor, output, lse, site.sink_logits)
