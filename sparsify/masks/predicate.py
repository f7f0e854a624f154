"""Records of what an attention mask was proved to say. `sparsify.masks.prove` makes them; methods and ops consume them.

Positions: query row `q` of a site sits at key position `q + query_start`. A key `k` is visible to it when every clause of the
record holds:

    causal      k <= q + query_start
    window      k >  q + query_start - window
    padding     padding[b, k + shift] != 0, or another comparison with a number
    rows        padding[b, q + query_start + shift] != 0, or the same other comparison
    documents   documents[b, k] == documents[b, q + query_start]
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import sympy
from torch import fx


class MaskKind(enum.Enum):
    NONE = "none"  # every key is visible
    PROVED = "proved"  # exactly the conjunction of the clauses below
    OPAQUE = "opaque"  # could not be read: refuse, stay dense, say why


@dataclass(frozen=True)
class QueryStart:
    """Key position of a site's first query row: `leaf + constant`, or bottom-right (`key_len - query_len`) when both are None.

    leaf: graph node of an integer tensor with one element, read at run time (a static cache's cumulative length).
    constant: integer expression over the graph's symbolic sizes.
    """

    leaf: fx.Node | None = None
    constant: sympy.Expr | None = None

    @property
    def bottom_right(self) -> bool:
        return self.leaf is None and self.constant is None


@dataclass(frozen=True)
class Leaf:
    """A tensor of the graph that a clause reads at [b, k + shift].

    node: graph node of a tensor [batch, at least key_len + shift]; a batch of 1 or no batch dimension broadcasts, and dimensions of size 1
        may lie between batch and keys.
    shift: tokens that the tensor begins before key 0.
    relation, number: for padding, the comparison that holds for a visible key; a function name of the `operator` module.
    """

    node: fx.Node
    shift: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    relation: Literal["ne", "eq", "gt", "ge", "lt", "le"] = "ne"
    number: int = 0


@dataclass(frozen=True)
class MaskPredicate:
    """The conjunction of clauses that a mask was proved to be, or the reason why it could not be proved.

    kind: NONE, PROVED or OPAQUE.
    causal: whether a row sees no key behind its own position.
    query_start: key position of the first query row.
    window: number of last tokens that each row sees, its own included; None without the clause. A window that covers all keys is dropped.
    padding: tensor that says which keys are tokens; None without the clause.
    rows: whether a row whose own key the padding hides sees no key.
    documents: tensor of document numbers, or of any number by which keys are grouped, such as that of a chunk; None without the clause.
    condition: the sympy condition on (b, h, q, k) as text, for reports.
    reason: why the mask is OPAQUE.
    adds: of an OPAQUE float mask, whether it was read and adds numbers that scores may reach: a bias.
    inputs: of an OPAQUE mask, the inputs of the graph that it is made from, or views of them: what is the last to share their memory.
    """

    kind: MaskKind
    causal: bool = False
    query_start: QueryStart = field(default_factory=QueryStart)
    window: int | None = None
    padding: Leaf | None = None
    documents: Leaf | None = None
    condition: str = ""
    reason: str = ""
    inputs: tuple[fx.Node, ...] = field(default=(), repr=False)
    rows: bool = False
    adds: bool = False

    @property
    def opaque(self) -> bool:
        return self.kind is MaskKind.OPAQUE

    def describe(self) -> str:
        """One short phrase for tables: `causal, window 4096, padding`."""
        if self.opaque:
            return f"opaque: {self.reason}"
        words: list[str] = []
        if self.causal:
            start = self.query_start
            if start.bottom_right:
                words.append("causal")
            elif start.leaf is not None:
                words.append(f"causal from {start.leaf.name}" + (f"+{start.constant}" if start.constant else ""))
            else:
                words.append(f"causal from {start.constant}")
        if self.window is not None:
            words.append(f"window {self.window}")
        if self.padding is not None:
            words.append("padding of rows and keys" if self.rows else "padding")
        if self.documents is not None:
            words.append("documents")
        return ", ".join(words) or "none"
