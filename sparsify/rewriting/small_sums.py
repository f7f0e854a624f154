"""Sums over processes in a graph: those of a token's few kilobytes become calls of `sparsify::small_sum`.

Only sums whose size is known, but for the number of sequences, are looked at: a guard then asks for that. A prompt's sums stay what they
are, collectives that Inductor knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from sparsify.costs import links
from sparsify.distributed import peers
from sparsify.distributed.peers import Peers
from sparsify.distributed.shards import process_group
from sparsify.graph.aliasing import example_tensor
from sparsify.masks.symbolic import plain, sizes
from sparsify.ops.gradients import Modes
from sparsify.ops.sums import SmallSumCall
from sparsify.rewriting.editor import Editor

_ALL_REDUCE, _WAIT = "_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"


@dataclass(frozen=True)
class _Sum:
    """part: what each process has. wait: the node that holds the sum."""

    part: fx.Node
    wait: fx.Node
    group: str

    @property
    def peers(self) -> Peers:
        return peers.of(self.group, example_tensor(self.part).device)


def _sums(graph: fx.Graph) -> list[_Sum]:
    found = []
    for node in graph.nodes:
        if _name(node) != _ALL_REDUCE or len(node.args) != 3 or node.args[1] != "sum":
            continue
        waits = [user for user in node.users if _name(user) == _WAIT]
        if len(waits) == len(node.users) == 1:
            found.append(_Sum(node.args[0], waits[0], node.args[2]))
    return found


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name().partition(".")[0]
    return target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else ""


def _may_be_small(one: _Sum) -> bool:
    """Whether a part may be summed through peers, as far as it can be told without a guard."""
    part = example_tensor(one.part)
    if one.peers.most == 0 or part.dim() != 3 or not part.is_contiguous():
        return False
    rows = [plain(size) for size in sizes(part)]
    if all(isinstance(size, int) for size in rows):
        return True
    # as many sequences as there may be, of one token each
    return rows[1] == 1 and isinstance(rows[2], int)


def replace(gm: fx.GraphModule) -> int:
    """Replaces sums that peers serve, in place.

    Returns:
        calls that were made.
    """
    graph = gm.graph
    found = [one for one in _sums(graph) if _may_be_small(one) and one.peers.takes(example_tensor(one.part))]
    if not found:
        return 0
    modes, editor = Modes(graph), Editor(graph)
    made = 0
    for one in found:
        part = editor.current(one.part)
        if modes.needs_grad(one.wait, (part,), set()) or modes.transformed((one.wait, part)):
            continue
        editor.move_before(one.wait)
        editor.substitute(one.wait, editor.emit(SmallSumCall.bind(part, group=one.group)))
        made += 1
    graph.lint()
    gm.recompile()
    return made


def any_found(graph: fx.Graph) -> bool:
    """Whether a graph has a sum that `replace` would look at; guards nothing."""
    return any(map(_may_be_small, _sums(graph)))


def told(graph: fx.Graph, allowed: bool) -> str:
    """How a graph's sums over processes of GPUs are made, in a clause; empty where it has none. allowed: as the configuration says."""
    lines: dict[str, int] = {}
    for one in _sums(graph):
        found, part = one.peers, example_tensor(one.part)
        up_to = links.shown(found.most)
        if part.device.type != "cuda" and not found.most:
            continue
        if not allowed:
            how = "through NCCL, as asked for"
        elif found.obstacle or not found.most:
            how = f"through NCCL ({found.obstacle or 'memory of peers was not prepared'})"
        elif part.dtype not in peers.DTYPES:
            how = f"through NCCL ({str(part.dtype).removeprefix('torch.')})"
        elif _may_be_small(one):
            size = math.prod(sizes(part)) * part.element_size()  # of symbols where a guard will ask
            known = isinstance(size, int | sympy.Integer) and int(size) > found.most
            how = f"through NCCL: more than the {up_to} that are read from peers" if known else f"read from peers up to {up_to}"
        else:
            how = f"through NCCL; those of tokens are read from peers up to {up_to}"
        processes = process_group(one.group).size()
        what = f"of {processes} processes, {how}"
        lines[what] = lines.get(what, 0) + 1
    return "; ".join(f"{count} {'sum' if count == 1 else 'sums'} {what}" for what, count in lines.items())
