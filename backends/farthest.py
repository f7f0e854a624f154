"""`sparsify::farthest_first`: one program a row, which holds how far every token is from what was taken, and in plain PyTorch, a few
launches for each token."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, integers, parameters, pointers
from sparsify.backends.codegen.launch import launch, launching, need, power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.ops.farthest import FarthestFirstCall

_WHERE = "sparsify::farthest_first"
# tokens of a row that one program holds in registers, and of each warp
_MOST, _A_WARP = 16384, 1024

TEXT = '''\
@triton.jit
def farthest_first(
    ${parameters},
):
    """One program: the picks of one batch row."""
    batch = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    count = tl.load(counts + batch).to(tl.int32)
    there = at < count
    rows = distances + tl.cast(batch, tl.int64) * tokens * tokens
    far = tl.load(nearest + batch * tokens + at, mask=there, other=float("-inf"))
    taken = tl.where(there, float("inf"), float("-inf"))
    for step in range(steps):
        pick = tl.argmax(far, 0, tie_break_left=True)
        left = step < count
        tl.store(picks + batch * steps + step, tl.where(left, pick, -1).to(tl.int64))
        row = tl.load(rows + tl.cast(pick, tl.int64) * tokens + at, mask=there & left, other=float("-inf"))
        taken = tl.minimum(taken, tl.where(at == pick, float("-inf"), row))
        far = taken
'''


def arguments() -> tuple[Argument, ...]:
    """The kernel's arguments, in order."""
    return (*pointers("fp32", "distances", "nearest"), *pointers("i64", "counts", "picks"), *integers("tokens", "steps"))


def farthest_first_source(width: int) -> str:
    """Module text with `farthest_first` (grid: batch). width: tokens that a program holds."""
    text = render(TEXT, {"parameters": parameters(arguments())})
    return "\n\n".join([header("Tokens that lie far from each other", {"WIDTH": width}), text])


@functools.lru_cache(maxsize=16)
def _module(width: int) -> ModuleType:
    return source.load(farthest_first_source(width), "farthest_first")


def warps(width: int) -> int:
    """Of a program that holds so many tokens."""
    return max(1, min(16, width // _A_WARP))


def by_kernel(call: FarthestFirstCall) -> Tensor:
    """The op, by one launch behind that of the nearest tokens.

    Raises:
        UnsupportedError: a row has more tokens than one program holds.
        KernelError: the kernel could not be compiled or launched.
    """
    need(call.tokens <= _MOST, f"{call.tokens} tokens a row", _WHERE)
    picks, width = call.empty_picks(), power_of_two(call.tokens)
    given = {
        "distances": call.distances.contiguous(), "nearest": nearest_others(call), "counts": call.counts.to(torch.int64), "picks": picks,
        "tokens": call.tokens, "steps": call.steps,
    }  # fmt: skip
    with launching(picks.device, lambda: f"{_WHERE} of up to {width} tokens"):
        launch(_module(width).farthest_first, (len(picks),), arguments(), given, num_warps=warps(width), num_stages=1)
    return picks


def reference(call: FarthestFirstCall) -> Tensor:
    """The op in plain PyTorch."""
    absent = _absent(call)
    diagonal = torch.eye(call.tokens, dtype=torch.bool, device=absent.device)
    distances = call.distances.masked_fill(diagonal | absent[:, None], -torch.inf)  # what is taken is not taken again
    far, batch = nearest_others(call), torch.arange(len(absent), device=absent.device)
    taken = torch.full_like(far, torch.inf).masked_fill_(absent, -torch.inf)
    picks = call.empty_picks()
    for step in range(call.steps):
        pick = far.argmax(-1)
        picks[:, step] = torch.where(step < call.counts, pick, -1)
        far = taken = torch.minimum(taken, distances[batch, pick])
    return picks


def nearest_others(call: FarthestFirstCall) -> Tensor:
    """How far each token's nearest other one is, fp32 [batch, tokens]; -inf where there is no token, inf where it has no other."""
    absent = _absent(call)
    others = call.distances.masked_fill(absent[:, None], torch.inf)
    others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return others.amin(-1).masked_fill_(absent, -torch.inf)


def _absent(call: FarthestFirstCall) -> Tensor:
    return torch.arange(call.tokens, device=call.counts.device) >= call.counts[:, None]
