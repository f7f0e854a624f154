"""Finds what a SparseCache does in a Dynamo graph: a `cache_store` per layer and the attention that belongs to it."""

from __future__ import annotations

import torch
from torch import fx

from sparsify.graph import unforeseen
from sparsify.graph.aliasing import example_tensor
from sparsify.graph.calls import as_node
from sparsify.matching.base import CACHE_SUFFIX
from sparsify.matching.facts import layer_of
from sparsify.matching.sites import CacheSite
from sparsify.ops import cache


def find_cache(gm: fx.GraphModule) -> list[CacheSite]:
    """Every layer of a SparseCache, in execution order. Nothing in the graph is changed."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    stores = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is cache.store]
    readers = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is cache.attention]
    sites = []
    for index, store in enumerate(stores):
        try:
            sites.append(_site(index, store, readers, order))
        except Exception as error:  # called by hand, in another form than ours: it runs as it stands
            unforeseen.reason(error, store.name)
    return sites


def made_inside(gm: fx.GraphModule) -> fx.Node | None:
    """The first cache op on a CUDA device whose buffers this very graph makes: CUDA graphs would take their memory back."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (cache.store, cache.decode):
            if len(node.args) < 4 or as_node(node.args[3]).op == "placeholder":
                continue
            tensor = as_node(node.args[1]).meta.get("example_value")
            if tensor is not None and tensor.device.type == "cuda":
                return node
    return None


def stores_many(gm: fx.GraphModule) -> bool:
    """Whether several tokens at once are stored, before which attention reads what the buffers hold."""
    return any(node.op == "call_function" and node.target is cache.store for node in gm.graph.nodes)


def _site(index: int, store: fx.Node, readers: list[fx.Node], order: dict[fx.Node, int]) -> CacheSite:
    call = cache.CacheStoreCall.bind(*store.args, **store.kwargs)
    key, value, state = as_node(call.key), as_node(call.value), tuple(map(as_node, call.state))
    mine = [reader for reader in readers if reader.args[1] is state[0]]
    size = lambda node: [s.node.expr if isinstance(s, torch.SymInt) else s for s in example_tensor(node).shape]
    batch, kv_heads, query_len, qk_head_dim = size(key)
    single, empty = query_len == 1, call.empty is True
    stored_alone = empty and not single and not mine  # a prompt's attention is a site of its own
    near_miss = "" if len(mine) == 1 or stored_alone else f"{len(mine)} attentions read this layer's slots"
    if near_miss and not mine:  # slots that processes share are read by ops of their own, whose results are joined
        near_miss = "no single attention reads this layer's slots, as where processes share the text"
    output = mine[0] if len(mine) == 1 else store
    if single and not near_miss:
        near_miss = _find_obstacle(store, output, state, order)
    query = as_node(mine[0].args[0]) if mine else key if call.query is None else as_node(call.query)
    name, layer = layer_of(output)
    tensor = example_tensor(key)
    return CacheSite(
        name=name + CACHE_SUFFIX,
        layer=layer,
        index=index,
        output=output,
        store=store,
        query=query,
        key=key,
        value=value,
        state=state,
        batch=batch,
        query_heads=size(query)[1],
        kv_heads=kv_heads,
        query_len=query_len,
        key_len=size(state[0])[2],
        qk_head_dim=qk_head_dim,
        v_head_dim=size(value)[3],
        dtype=tensor.dtype,
        device=tensor.device,
        empty=empty,
        near_miss=near_miss,
        pages=call.pages,
        codes=call.codes,
    )


def _find_obstacle(store: fx.Node, reader: fx.Node, state: tuple[fx.Node, ...], order: dict[fx.Node, int]) -> str:
    """Why store and attention are not one decode step, or nothing: what lies between them must not touch the layer's state."""
    keys, values, positions, _, seen, _ = state
    if tuple(reader.args[1:5]) != (keys, values, positions, seen):
        return "the attention reads other buffers than the store wrote"
    if reader.kwargs.get("new_key") is not None or order[reader] < order[store]:
        return "the attention does not follow the store"
    users = {user for node in state for user in node.users}
    between = [user for user in users if order[store] < order[user] < order[reader]]
    return f"{between[0].name} uses the layer's state between store and attention" if between else ""
