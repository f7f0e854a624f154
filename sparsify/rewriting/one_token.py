"""A decode step over a cache as torch's own operations, where the graph is told how many slots are filled and a CPU runs it.

`sparsify::cache_decode` is called from Python, once a layer, and beside the layers of a small model such a call is a good part of a token.
Over slots that are all filled and all seen it is three copies, three sums and attention over the first slots, which Inductor writes into
the code around them.

This follows the methods' rewriting; `sparsify.backends.cache.one_token` is the same for calls that are told nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph.aliasing import example_tensor
from sparsify.graph.calls import as_node
from sparsify.ops import cache
from sparsify.ops.cache import CacheDecodeCall
from sparsify.rewriting.editor import Editor

# arguments that say nothing of the result here: where the tokens go is told, tickets are a kernel's
_SERVED = ("tickets", "filled")


def finds_any(graph: fx.Graph, serves: Callable[[torch.device], bool]) -> bool:
    """Whether a graph has a step that `write_out` would replace."""
    return any(_step(node, serves) is not None for node in graph.nodes)


def write_out(gm: fx.GraphModule, serves: Callable[[torch.device], bool]) -> int:
    """Replaces decode steps, in place.

    Args:
        serves: whether steps on a device are replaced.

    Returns:
        steps that were replaced.
    """
    steps = [(node, call) for node in gm.graph.nodes if (call := _step(node, serves)) is not None]
    editor = Editor(gm.graph)
    for node, call in steps:
        _write(editor.move_before(node), node, call)
    gm.graph.lint()
    gm.recompile()
    return len(steps)


def _step(node: fx.Node, serves: Callable[[torch.device], bool]) -> CacheDecodeCall | None:
    """The call of a node that is a step which this knows."""
    if node.op != "call_function" or node.target is not cache.decode:
        return None
    call = CacheDecodeCall.bind(*node.args, **node.kwargs)
    # sinks say nothing where there is no window
    if call.filled is None or call.beyond(_SERVED) or call.softcap or call.window or call.pinned != cache.NEVER_OVERWRITTEN:
        return None
    tensors = [example_tensor(as_node(operand)) for operand in (call.query, call.key, call.value, call.keys, call.values)]
    if any(tensor.dtype != torch.float32 or not serves(tensor.device) for tensor in tensors):
        return None
    return call


def _write(editor: Editor, node: fx.Node, call: CacheDecodeCall) -> None:
    fresh = editor.call(operator.getitem, call.seen, (slice(None), None, None))
    for state, token in ((call.keys, call.key), (call.values, call.value), (call.positions, fresh)):
        editor.method("copy_", editor.method("narrow", state, 2, call.filled, 1), token)
    for count in (call.counts, call.seen, call.length):
        editor.method("add_", count, 1)
    stored = editor.call(operator.add, call.filled, 1)
    keys, values = (editor.method("narrow", state, 2, 0, stored) for state in (call.keys, call.values))
    grouped = example_tensor(as_node(call.keys)).shape[1] != example_tensor(as_node(call.query)).shape[1]
    found = editor.call(F.scaled_dot_product_attention, call.query, keys, values, scale=call.scale, enable_gqa=grouped)
    node.replace_all_uses_with(found)
    editor.graph.erase_node(node)
