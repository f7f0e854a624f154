"""Custom ops of a cache whose policy selects anew: every so many tokens, or after a turn. `sparsify.ops.cache` describes the state, whose
slots are used as under NEVER_OVERWRITTEN: tokens fill them in order until a selection leaves `kept`.

Beside the state there may be, changed in place only:

    carried          fp32 [batch, kv_heads, capacity]                what a policy knows of the token in a slot from earlier selections
    queries          [batch, query_heads, observed, head_dim]        the row's last queries: that of position p at p mod observed
    query_positions  int32 [batch, observed]                         -1 for none

`cache_reselect` adds query_len tokens, which may be 0. In rows that then hold more than `limit` tokens, the newest `recent` and those that
the policy scores best stay, `kept` together. What stays lies in order of position, and slots behind it hold zeros. A policy that
carries is asked in every call, and knows of a query once: such queries are forgotten then.

`cache_observe` notes the queries of one-token calls. It is called before the token is stored.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsify.ops.cache import WritingCall
from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import define

# Compiled graphs are cached by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 2


@dataclass(frozen=True, eq=False)
class CacheReselectCall(WritingCall):
    """One call of `sparsify::cache_reselect`; the module says what is computed.

    query: of the call's tokens; None for policies that observe none.
    is_token: bool [batch, query_len], False for padding, which is not stored; None: no padding.
    carried, queries, query_positions: as the module says; None: the policy has no use for them.
    starts: int32 [batch, kv_heads + 1], as `sparsify.ops.cache` says; None: all heads keep as many.
    codes: "fp8" or "int4" where keys and values are codes; then the buffers that `sparsify.ops.quantised` describes are given,
        too. Tokens of the last group lie as they came afterwards.
    limit: tokens of a head beyond which the policy selects; of one whose slots are more or fewer than `capacity`, so many more or fewer.
    kept: tokens that it leaves, with `starts` on the mean of a row's heads, whose shares `Policy.share` says.
    recent: newest tokens that no score evicts.
    empty: nothing is stored yet, whatever a call that failed may have left in the buffers.
    policy: `sparsify.policies.Policy.describe`'s text.
    scale: of the attention's logits, for policies that observe queries.
    softcap: bound of those logits, 0 for none.
    """

    NAME: ClassVar[str] = "cache_reselect"
    VERSION: ClassVar[int] = VERSION

    _: KW_ONLY
    is_token: Annotated[Tensor | None, Operand("batch query_len", "integers")] = None
    carried: Annotated[Tensor | None, Operand("batch kv_heads capacity", "floats", written=True)] = None
    queries: Annotated[Tensor | None, Operand("batch query_heads observed head_dim", "floats", written=True)] = None
    query_positions: Annotated[Tensor | None, Operand("batch observed", "integers", written=True)] = None
    starts: Annotated[Tensor | None, Operand("batch kv_heads_and_one", "integers", written=True)] = None
    codes: str = ""
    key_scales: Annotated[Tensor | None, Operand("batch kv_heads groups parts head_dim", "floats", written=True)] = None
    value_scales: Annotated[Tensor | None, Operand("batch kv_heads capacity parts", "floats", written=True)] = None
    recent_keys: Annotated[Tensor | None, Operand("batch kv_heads recent head_dim", "floats", written=True)] = None
    recent_values: Annotated[Tensor | None, Operand("batch kv_heads recent v_head_dim", "floats", written=True)] = None
    staged: Annotated[Tensor | None, Operand("batch kv_heads ends", "integers", written=True)] = None
    limit: int
    kept: int
    recent: int
    empty: bool
    policy: str
    scale: float
    softcap: float


@dataclass(frozen=True, eq=False)
class CacheObserveCall(OpCall):
    """One call of `sparsify::cache_observe`; the module says what is computed.

    query: [batch, query_heads, 1, head_dim].
    queries, query_positions: as the module says.
    seen: of the layer's state, read only.
    is_token: bool [batch, 1], False for padding, whose query is not noted; None: no padding.
    """

    NAME: ClassVar[str] = "cache_observe"
    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor, Operand("batch query_heads 1 head_dim", "floats")]
    queries: Annotated[Tensor, Operand("batch query_heads observed head_dim", "floats", written=True)]
    query_positions: Annotated[Tensor, Operand("batch observed", "integers", written=True)]
    seen: Annotated[Tensor, Operand("batch", "integers")]
    _: KW_ONLY
    is_token: Annotated[Tensor | None, Operand("batch 1", "integers")] = None


reselect = define(CacheReselectCall, lambda _: None, "()")
observe = define(CacheObserveCall, lambda _: None, "()")
