"""Proves what an attention mask says: its subgraph is read as a condition on (b, h, q, k), which is split into a predicate's clauses.

A step is taken only when it is an identity or follows from Dynamo's ranges and guards; no guard is installed. The only assumptions are the
bounds on sizes and data in `symbolic`, by which overflow is excluded, and that a tensor has the batch's rows where both are symbols of one
value, which the rewriting turns into a guard. Any remainder makes the mask OPAQUE, with the reason.
"""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import fx

import sparsify.masks.readings  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers how operators are read
from sparsify.graph.aliasing import Memory, example_tensor
from sparsify.graph.compat import operator_word
from sparsify.masks.predicate import Leaf, MaskKind, MaskPredicate, QueryStart
from sparsify.masks.reader import Reader, describe_failure
from sparsify.masks.symbolic import (
    BATCH,
    COMPUTED,
    FURTHEST,
    HEAD,
    KEY,
    QUERY,
    Cases,
    Element,
    Facts,
    Unreadable,
    as_condition,
    cases,
    compare,
    limits,
    loads,
    replaced,
    sides,
    sizes,
)

_ORDER = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)
_INDICES = (BATCH, HEAD, QUERY, KEY)
_Relation = Literal["ne", "eq", "gt", "ge", "lt", "le"]
_RELATIONS: dict[type[Relational], _Relation] = {
    sympy.Ne: "ne",
    sympy.Eq: "eq",
    sympy.Gt: "gt",
    sympy.Ge: "ge",
    sympy.Lt: "lt",
    sympy.Le: "le",
}

# what gives numbers of a model, not a mask, where it is all that is added to scores
SOURCES = {"embedding", "gather", "take_along_dim", "index_select", "linear", "matmul", "bmm", "baddbmm", "einsum"}


@dataclass(frozen=True)
class Extents:
    """Sizes of a site: integer expressions over the graph's symbolic sizes."""

    batch: sympy.Expr
    heads: sympy.Expr
    query_len: sympy.Expr
    key_len: sympy.Expr


def none() -> MaskPredicate:
    """The predicate of a site without a mask: every key is visible."""
    return MaskPredicate(MaskKind.NONE)


def unmasked(own_key_last: bool) -> MaskPredicate:
    """The predicate of a site without a mask.

    Args:
        own_key_last: the site has one query and its own key is the last one. That is the last row of causal attention, and is recorded as
            causal for methods that need an order of keys.
    """
    return MaskPredicate(MaskKind.PROVED, causal=True, condition="k <= q") if own_key_last else none()


def opaque(reason: str, condition: str = "") -> MaskPredicate:
    """The predicate of a mask that could not be proved."""
    return MaskPredicate(MaskKind.OPAQUE, reason=reason, condition=condition)


def top_left_causal(extents: Extents, shape_env: object) -> MaskPredicate:
    """The predicate of `scaled_dot_product_attention(is_causal=True)`: k <= q, whatever the number of keys."""
    square = Facts(shape_env).holds(sympy.Eq(extents.query_len, extents.key_len))
    start = QueryStart() if square else QueryStart(constant=sympy.Integer(0))
    return MaskPredicate(MaskKind.PROVED, causal=True, query_start=start, condition="k <= q")


Form = Literal["mask", "hidden", "ones"]


class Adds(Unreadable):
    """A float mask adds a number that scores may reach."""


def prove(masks: Sequence[tuple[fx.Node, Form, fx.Node]], extents: Extents, memory: Memory, shape_env: object) -> MaskPredicate:
    """Proves the conjunction of a site's masks: a key is visible where all of them show it.

    Args:
        masks: a tuple (mask, form, reader) for each.
            mask: boolean [.., query_len, key_len] (True: visible; form "hidden": True hides) or float (0: visible, -inf or the dtype's
            minimum: hidden) or of form "ones" (1: visible, 0: hidden), broadcastable to [batch, query_heads, query_len, key_len]. reader:
            the node that consumes it.
        extents: the site's sizes. A mask's last two sizes replace query_len and key_len where they are not 1: attention would fail
            if they differed.
        memory: the in-place writes of the graph.
        shape_env: Dynamo's facts about symbolic sizes; None when all sizes are numbers.

    Returns:
        the predicate; OPAQUE with the reason where anything could not be proved.
    """
    proof = None
    try:
        proof = _Proof(masks, extents, memory, shape_env)
        found = proof.run()
    except Exception as why:
        found = dataclasses.replace(opaque(describe_failure(why)), adds=isinstance(why, Adds))
    return dataclasses.replace(found, inputs=proof.inputs()) if proof is not None and found.opaque else found


@dataclass
class _Clauses:
    """The conjuncts of a condition, sorted by form.

    upper: bounds u with k - q <= u.
    lower: bounds l with k - q >= l.
    limits: bounds m with k <= m.
    padding: conditions on tensors read at the key.
    rows: conditions on tensors read at the query.
    documents: pairs of numbers, one of the key and one of the query, that must be equal.
    """

    upper: list[sympy.Expr] = field(default_factory=list)
    lower: list[sympy.Expr] = field(default_factory=list)
    limits: list[sympy.Expr] = field(default_factory=list)
    padding: list[Boolean] = field(default_factory=list)
    rows: list[Boolean] = field(default_factory=list)
    documents: list[tuple[sympy.Expr, sympy.Expr]] = field(default_factory=list)


class _Proof:
    def __init__(self, masks: Sequence[tuple[fx.Node, Form, fx.Node]], extents: Extents, memory: Memory, shape_env: object):
        self.masks, self.memory = masks, memory
        shapes = [sizes(example_tensor(mask)) for mask, _, _ in masks]
        wrong = [shape for shape in shapes if not 2 <= len(shape) <= 4]
        if wrong:
            raise Unreadable(f"a mask of {len(wrong[0])} dimensions")
        batch, heads = extents.batch, extents.heads
        self.query_len = next((shape[-2] for shape in shapes if shape[-2] != 1), extents.query_len)
        self.key_len = next((shape[-1] for shape in shapes if shape[-1] != 1), extents.key_len)
        self.facts = Facts(shape_env, dict(zip(_INDICES, (batch, heads, self.query_len, self.key_len), strict=True)))
        self.reader = Reader(self.facts)
        self.bottom_right = sympy.expand(self.key_len - self.query_len)

    def element(self, mask: fx.Node, reader: fx.Node) -> Element:
        """The mask's element at (b, h, q, k)."""
        at = [sympy.Integer(0) if self.facts.extents[s] == 1 else s for s in _INDICES]
        element = self.reader.spread(mask, tuple(self.facts.extents.values()))(*at)
        changed = self.memory.written_while_read(self.reader.nodes, reader)
        if changed is not None:
            raise Unreadable(f"{changed.name} is written while the mask is made")
        return element

    def run(self) -> MaskPredicate:
        return self.classify(sympy.And(*(self.condition(*mask) for mask in self.masks)))

    def condition(self, mask: fx.Node, form: Form, reader: fx.Node) -> Boolean:
        """The condition under which one mask shows a key."""
        element = self.element(mask, reader)
        dtype = example_tensor(mask).dtype
        if form == "ones":
            return ones(element)
        if dtype.is_floating_point:
            if isinstance(element, AppliedUndef):
                looked_up = operator_word(self.reader.leaves[element.func.__name__]) in SOURCES
                raise Unreadable("the mask adds a bias" if looked_up else self.why(element))
            return additive(element, dtype)
        if dtype is not torch.bool:
            raise Unreadable(f"a mask of {dtype}")
        return as_condition(element) if form == "mask" else sympy.Not(as_condition(element))

    def inputs(self) -> tuple[fx.Node, ...]:
        """What the masks take from inputs of the graph, as `MaskPredicate.inputs`."""
        given = {s for node in self.reader.leaves.values() if node.op == "placeholder" for s in self.memory.storages(node)}
        members = {*self.reader.nodes, *(reader for _, _, reader in self.masks)}
        views = [node for node in self.reader.nodes if given & set(self.memory.storages(node))]
        return tuple(node for node in views if any(user in members and user not in views for user in node.users))

    def classify(self, condition: Boolean) -> MaskPredicate:
        text = str(condition)[:400]
        try:
            condition = sympy.to_nnf(condition, simplify=False)
            clauses = self.split(self.unpack(list(sympy.And.make_args(condition))))
            causal, start = self.causal(clauses)
            offset = self.offset(start)
            window, start = self.window(clauses, causal, start, offset)
            offset = self.offset(start)
            self.check_limits(clauses, causal, offset)
            padding, documents = self.padding(clauses), self.documents(clauses, offset)
            self.check_rows(clauses, offset)
        except Exception as why:
            return opaque(describe_failure(why), text)
        if not causal and window is None and padding is None and documents is None:
            return MaskPredicate(MaskKind.NONE, condition=text)
        return MaskPredicate(MaskKind.PROVED, causal, start, window, padding, documents, condition=text, rows=bool(clauses.rows))

    def unpack(self, clauses: list[Boolean]) -> list[Boolean]:
        """Replaces p[k] - p[q] by k - q within one run of consecutive positions p (packed sequences)."""
        for clause in clauses:
            for left, right in _equalities(clause):
                values = self.reader.runs.get(left.func.__name__)
                if values is not None and left.func == right.func and left.args[:-1] == right.args[:-1]:
                    a, b = values(*left.args), typing.cast(sympy.Expr, values(*right.args))
                    swap = {a: sympy.expand(operator.sub(b + _last_index(left), _last_index(right)))} if isinstance(a, AppliedUndef) else {}
                    clauses = [c if c is clause else _expand_relations(replaced(c, swap)) for c in clauses]
        return clauses

    def split(self, clauses: list[Boolean]) -> _Clauses:
        found = _Clauses()
        for clause in clauses:
            if not isinstance(clause, _ORDER) and not _is_load(clause):
                clause = self.facts.reduce(clause)
            for part in sympy.And.make_args(clause):
                self.sort(part, found)
        return found

    def sort(self, clause: Boolean, found: _Clauses) -> None:
        if clause is sympy.true:
            return
        if clause is sympy.false:
            raise Unreadable("it hides every key")
        if isinstance(clause, _ORDER) and self.bound(clause, found):
            return
        if (pair := self.compared(clause)) is not None:
            found.documents.append(pair)
        elif not clause.free_symbols & {QUERY, HEAD} and KEY in clause.free_symbols | self.fixed():
            found.padding.append(clause)
        elif QUERY in clause.free_symbols and loads(clause) and not clause.free_symbols & {KEY, HEAD}:
            found.rows.append(clause)
        else:
            raise Unreadable(self.why(clause))

    def compared(self, clause: Boolean) -> tuple[sympy.Expr, sympy.Expr] | None:
        """What an equality compares: a number of the key with one of the query."""
        if not isinstance(clause, sympy.Eq):
            return None
        one, other = sides(clause)
        for of_key, of_query in ((one, other), (other, one)):
            mine = KEY in of_key.free_symbols and not of_key.free_symbols & {QUERY, HEAD}
            if mine and QUERY in of_query.free_symbols | self.fixed() and not of_query.free_symbols & {KEY, HEAD}:
                return (of_key, of_query) if loads(of_query) or QUERY in of_query.free_symbols else None
        return None

    def fixed(self) -> set[sympy.Symbol]:
        """Index symbols of dimensions of size 1, whose only value is 0."""
        return {s for s, extent in self.facts.extents.items() if extent == 1}

    def bound(self, clause: Relational, found: _Clauses) -> bool:
        """Files an inequality that is linear in q and k under upper, lower or limits; False where it is of another form."""
        left, right = sides(clause)
        difference = left - right
        if isinstance(clause, (sympy.Ge, sympy.Gt)):
            difference = -difference
        difference = sympy.expand(difference + (1 if clause.func in (sympy.Lt, sympy.Gt) else 0))  # integers: difference <= 0
        by_key, by_query = difference.coeff(KEY, 1), difference.coeff(QUERY, 1)
        rest = sympy.expand(difference - by_key * KEY - by_query * QUERY)
        if rest.has(*_INDICES):
            return False
        one_query, one_key = (self.facts.extents[s] == 1 for s in (QUERY, KEY))
        if by_key == 0 and by_query == 0 and not one_key and not loads(rest):
            if not self.facts.holds(sympy.Le(rest, 0)):
                raise Unreadable(f"{clause} is not decided by the sizes")
            return True
        key_rises, key_falls = by_key == 1 or (one_key and by_key == 0), by_key == -1 or (one_key and by_key == 0)
        query_falls, query_rises = by_query == -1 or one_query, by_query == 1 or one_query
        if one_key and by_key == 0:
            # a single key: the sign of q, or of the tensor that was read, tells which bound it is
            key_rises = by_query == -1 or (one_query and all(rest.coeff(f) == -1 for f in loads(rest)))
        if key_rises and query_falls:
            found.upper.append(-rest)
        elif key_falls and query_rises:
            found.lower.append(rest)
        elif by_key == 1 and by_query == 0:
            found.limits.append(-rest)
        else:
            return False
        return True

    def why(self, clause: sympy.Basic) -> str:
        """Why a clause is not recognised: the tensor or the form that prevents it."""
        for load in sorted(loads(clause), key=str):
            node = self.reader.leaves.get(load.func.__name__)
            if node is None or not (example_tensor(node).dim() == 4 or load.free_symbols >= {QUERY, KEY}):
                continue
            return "the mask is an input of the graph" if node.op == "placeholder" else f"{node.name}: {self.reader.reasons[node.name]}"
        if isinstance(clause, sympy.Or):
            return "visibility is a disjunction (prefix, chunks or a union of masks)"
        for load in sorted(loads(clause), key=str):
            node = self.reader.leaves.get(load.func.__name__)
            reason = self.reader.reasons.get(load.func.__name__)
            if node is not None and node.op != "placeholder" and reason:
                return f"{node.name}: {reason}"
        return f"no clause is known for {str(clause)[:120]}"

    # -- from bounds to clauses ------------------------------------------------------------------------------------------------

    def tightest(self, bounds: list[sympy.Expr], upper: bool) -> sympy.Expr | None:
        """The bound that implies all others."""
        bounds = list(dict.fromkeys(sympy.expand(b) for b in bounds))
        for one in bounds:
            if all(other is one or self.holds_between(one, other, upper) for other in bounds):
                return one
        if bounds:
            raise Unreadable(f"two bounds of unknown order: {bounds[0]} and {bounds[1]}")
        return None

    def holds_between(self, one: sympy.Expr, other: sympy.Expr, upper: bool) -> bool:
        difference = sympy.expand(one - other)
        return self.facts.holds(sympy.Le(difference, 0) if upper else sympy.Ge(difference, 0))

    def causal(self, clauses: _Clauses) -> tuple[bool, QueryStart]:
        last = self.key_len - 1
        exact = [u for u in clauses.upper if self.facts.holds(sympy.Eq(u, self.bottom_right))]
        kept = [u for u in clauses.upper if u in exact or not self.facts.holds(sympy.Ge(u, last))]
        bound = self.tightest(exact[:1] + [u for u in kept if u not in exact], upper=True)
        if bound is None:
            return False, QueryStart()
        if bound in exact:
            return True, QueryStart()
        found = loads(bound)
        if not found:
            return True, QueryStart(constant=computed(bound))
        load = next(iter(found))
        constant = sympy.expand(bound - load)
        node = self.reader.leaves[load.func.__name__]
        if len(found) > 1 or loads(constant) or any(a != 0 for a in load.args) or any(s != 1 for s in sizes(example_tensor(node))):
            raise Unreadable(f"the causal offset {bound} is no single number")
        if example_tensor(node).dtype not in (torch.int32, torch.int64):
            raise Unreadable(f"the causal offset is {example_tensor(node).dtype}")
        return True, QueryStart(leaf=node, constant=computed(constant) if constant != 0 else None)

    def offset(self, start: QueryStart) -> sympy.Expr:
        """The query start as an expression, in which a leaf is an uninterpreted read."""
        if start.bottom_right:
            return self.bottom_right
        constant = start.constant if start.constant is not None else sympy.Integer(0)
        if start.leaf is None:
            return constant
        load = next(f for f in self._all_loads if f.func.__name__ == start.leaf.name)
        return operator.add(load, constant)

    @property
    def _all_loads(self) -> set[AppliedUndef]:
        found: set[AppliedUndef] = set()
        for name, node in self.reader.leaves.items():
            tensor = example_tensor(node)
            if all(s == 1 for s in sizes(tensor)):
                function = sympy.Function(name, integer=True)
                found.add(function(*([sympy.Integer(0)] * max(tensor.dim(), 1))))
        return found

    def window(self, clauses: _Clauses, causal: bool, start: QueryStart, offset: sympy.Expr) -> tuple[int | None, QueryStart]:
        """The window of a bound k - q >= L, offset + 1 - L tokens; the causal bound is written in whichever form makes that a constant."""
        furthest = sympy.expand(1 - self.query_len)
        lower = [bound for bound in clauses.lower if not self.facts.holds(sympy.Le(bound, furthest))]
        bound = self.tightest(lower, upper=False)
        if bound is None:
            return None, start
        width = bound
        for origin in (offset, *(u for u in clauses.upper if self.facts.holds(sympy.Eq(u, offset)))):
            width = sympy.expand(origin + 1 - bound)
            if width.is_Integer:
                break
        else:
            if causal or not bound.is_Integer:
                raise Unreadable(f"the window {width} is not a constant")
            width, start = sympy.expand(1 - bound), QueryStart(constant=sympy.Integer(0))
        if width <= 0:
            raise Unreadable("the window hides every key")
        if width > self.facts.magnitude(sympy.expand(self.query_len + self.offset(start))):
            return None, start  # it reaches further back than any row stands
        if width > FURTHEST:
            raise Unreadable(f"a window of {width} tokens")
        return int(width), start

    def check_limits(self, clauses: _Clauses, causal: bool, offset: sympy.Expr) -> None:
        """What is not implied and depends on data is a padding clause: a number of keys for each row of the batch."""
        for limit in clauses.limits:
            vacuous = self.facts.holds(sympy.Ge(limit, self.key_len - 1))
            implied = causal and self.facts.holds(sympy.Le(sympy.expand(self.query_len - 1 + offset - limit), 0))
            if loads(limit) and not vacuous and not implied:
                clauses.padding.append(sympy.Lt(KEY, sympy.expand(limit + 1)))
            elif not vacuous and not implied:
                raise Unreadable(f"keys end at {limit}, which the causal clause does not imply")

    def check_rows(self, clauses: _Clauses, offset: sympy.Expr) -> None:
        """Refuses conditions on rows that are not the padding's at the row's own key."""
        if not clauses.rows:
            return
        own = offset if QUERY in self.fixed() else offset + QUERY
        if {*clauses.rows} != {replaced(clause, {KEY: own}) for clause in clauses.padding}:
            raise Unreadable(self.why(sympy.And(*clauses.rows)))
        if clauses.documents:
            raise Unreadable("padding of rows beside documents")
        if not self.facts.holds(sympy.Ge(offset, 0)) or not self.facts.holds(sympy.Le(offset + self.query_len, self.key_len)):
            raise Unreadable("padding of rows that have no key of their own")

    def padding(self, clauses: _Clauses) -> Leaf | None:
        wanted: Boolean = sympy.And(*dict.fromkeys(self.held(clause) for clause in clauses.padding))
        if wanted is sympy.true:
            return None
        if wanted is sympy.false:
            raise Unreadable("it hides every key")
        if isinstance(wanted, Relational) and (relation := _RELATIONS.get(wanted.func)) is not None:
            left, right = sides(wanted)
            leaf = self.rows(left, KEY, self.key_len) if isinstance(left, AppliedUndef) and right.is_Integer else None
            if leaf is not None:
                return dataclasses.replace(leaf, relation=relation, number=int(right))
        for node in reversed(self.reader.nodes):
            tensor = example_tensor(node)
            flat = tensor.dim() > 1 and all(size == 1 for size in sizes(tensor)[1:-1])
            if flat and tensor.dtype is torch.bool and self.rows_of_batch(node) and self.is_wide(node, self.key_len):
                row = sympy.Integer(0) if tensor.shape[0] == 1 else BATCH
                key = sympy.Integer(0) if KEY in self.fixed() else KEY
                if as_condition(self.reader.read(node).at(row, *[sympy.Integer(0)] * (tensor.dim() - 2), key)) == wanted:
                    return Leaf(node)
        raise Unreadable(self.why(wanted))

    def held(self, clause: Boolean) -> Boolean:
        """Decides a comparison with a number that the tensor's integer dtype cannot hold, where a kernel would let it wrap around."""
        if not isinstance(clause, Relational) or clause.func not in _RELATIONS:
            return clause
        left, right = sides(clause)
        if not isinstance(left, AppliedUndef) or not right.is_Integer:
            return clause
        dtype = example_tensor(self.reader.leaves[left.func.__name__]).dtype
        if dtype.is_floating_point or dtype.is_complex:
            return clause
        least, largest = limits(dtype)
        return clause if least <= right <= largest else compare(clause.func, sympy.Integer(0), right)

    def rows(self, load: AppliedUndef, index: sympy.Symbol, length: sympy.Expr) -> Leaf | None:
        """The tensor that `load` reads at [b, index + shift]; None where it is read otherwise."""
        node = self.reader.leaves[load.func.__name__]
        if example_tensor(node).dtype.is_floating_point or example_tensor(node).dim() == 0:
            return None
        # without a batch dimension one row serves all; dimensions of size 1 may lie between batch and keys
        (row, *between, column) = load.args if len(load.args) > 1 else (sympy.Integer(0), *load.args)
        if any(size != 1 for size in sizes(example_tensor(node))[1:-1]) or any(index != 0 for index in between):
            return None
        shift = sympy.expand(column - (sympy.Integer(0) if index in self.fixed() else index))
        if shift.has(*_INDICES) or loads(shift) or not self.facts.holds(sympy.Ge(shift, 0)):
            return None
        single = row == 0 and (example_tensor(node).dim() == 1 or example_tensor(node).shape[0] == 1)
        if not (single or (row == BATCH and self.rows_of_batch(node))) or not self.wide_enough(node, shift + length):
            return None
        return Leaf(node, computed(shift))

    def rows_of_batch(self, node: fx.Node) -> bool:
        """Whether a tensor has one row, or exactly those of the batch: as far as is known, where they are symbols that do not contradict
        it; expanding the rows to the batch, when the site is rewritten, makes it a guard."""
        rows, batch = sizes(example_tensor(node))[0], self.facts.extents[BATCH]
        return rows == 1 or self.facts.holds(sympy.Eq(rows, batch)) or self.facts.equal_so_far(rows, batch)

    def is_wide(self, node: fx.Node, width: sympy.Expr) -> bool:
        return self.facts.holds(sympy.Ge(sizes(example_tensor(node))[-1], width))

    def wide_enough(self, node: fx.Node, width: sympy.Expr) -> bool:
        """Whether the tensor is not known to have fewer columns; if it had, the graph itself would fail."""
        return not self.facts.holds(sympy.Lt(sizes(example_tensor(node))[-1], width))

    def documents(self, clauses: _Clauses, offset: sympy.Expr) -> Leaf | None:
        pairs = list(dict.fromkeys(clauses.documents))
        if not pairs:
            return None
        if len(pairs) > 1:
            raise Unreadable("two document masks")
        ((of_key, of_query),) = pairs
        leaf = self.number_of_key(of_key)
        if leaf is None:
            raise Unreadable(self.why(sympy.Eq(of_key, of_query)))
        own = offset if QUERY in self.fixed() else offset + QUERY
        mine, other = (self.facts.settled(sympy.expand(one)) for one in (of_key.xreplace({KEY: own}), of_query))
        if sympy.expand(mine) != sympy.expand(other):
            raise Unreadable("documents are compared at other positions than the causal clause's")
        if not self.facts.holds(sympy.Ge(offset, 0)) or not self.facts.holds(sympy.Le(offset + self.query_len, self.key_len)):
            raise Unreadable("documents of queries that have no key of their own")
        return leaf

    def number_of_key(self, number: sympy.Expr) -> Leaf | None:
        """The tensor that holds a number of the key; None without one."""
        if isinstance(number, AppliedUndef):
            return self.rows(number, KEY, self.key_len)
        for node in reversed(self.reader.nodes):
            tensor = example_tensor(node)
            if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() < 1 or any(size != 1 for size in sizes(tensor)[1:-1]):
                continue
            if (tensor.dim() > 1 and not self.rows_of_batch(node)) or not self.is_wide(node, self.key_len):
                continue
            row: list[sympy.Expr] = [] if tensor.dim() == 1 else [sympy.Integer(0) if tensor.shape[0] == 1 else BATCH]
            place = [*row, *[sympy.Integer(0)] * (tensor.dim() - 1 - len(row)), KEY]
            if self.reader.read(node).at(*place) == number:
                return Leaf(node)
        return None


def additive(element: Element, dtype: torch.dtype) -> Boolean:
    """The condition under which a float mask adds 0.

    Raises:
        Unreadable: elsewhere it adds more than its dtype's minimum.
    """
    visible: list[Boolean] = []
    lowest = torch.finfo(dtype).min
    for condition, value in cases(element):
        if not value.is_number:
            raise Unreadable("the mask adds a bias")
        if value == 0:
            visible.append(condition)
        elif not (value == -sympy.oo or (value.is_finite and typing.cast(sympy.Expr, value) <= sympy.Rational(lowest))):
            raise Adds(f"the mask adds {float(typing.cast(sympy.Expr, value)):g}")
    return sympy.Or(*visible)


def ones(element: Element) -> Boolean:
    """The condition under which a tensor of ones and zeros is 1.

    Raises:
        Unreadable: it holds other numbers.
    """
    if isinstance(element, Boolean):
        return element
    found = list(cases(element))
    if any(value not in (0, 1) for _, value in found):
        raise Unreadable("a factor that is not known to be 0 or 1")
    return sympy.Or(*(condition for condition, value in found if value == 1))


def computed(size: sympy.Expr) -> sympy.Expr:
    """The expression itself, when it can be computed from the graph's sizes at run time.

    Raises:
        Unreadable: it cannot.
    """
    parts = list(sympy.preorder_traversal(size))
    if all(part.is_Integer or part.is_Symbol or part.func in COMPUTED for part in parts) and size.is_integer is not False:
        return size
    raise Unreadable(f"the size {size} is computed from none")


def _is_load(clause: Boolean) -> bool:
    return isinstance(clause, (sympy.Ne, sympy.Eq)) and isinstance(clause.lhs, AppliedUndef)


def _equalities(clause: Boolean) -> list[tuple[AppliedUndef, AppliedUndef]]:
    """The two reads that an equality compares, as a list of one pair; empty for anything else."""
    if isinstance(clause, sympy.Eq) and isinstance(clause.lhs, AppliedUndef) and isinstance(clause.rhs, AppliedUndef):
        return [(clause.lhs, clause.rhs)]
    return []


def _last_index(load: AppliedUndef) -> sympy.Expr:
    return load.args[-1]


def _expand_relations(clause: Boolean) -> Boolean:
    swaps = {atom: type(atom)(sympy.expand(operator.sub(*sides(atom))), 0) for atom in clause.atoms(*_ORDER)}
    return replaced(clause, swaps)


__all__ = ["Cases", "Extents", "additive", "none", "opaque", "prove", "top_left_causal"]
