"""Runs the calls of `sparsify.costs.samples` on a device and times them: CUDA graphs for short calls, so that no host time is in them."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.backends import dispatch
from sparsify.backends.attention import cpp, reference, triton
from sparsify.backends.select import reference as select_reference
from sparsify.commands.calibrate.structured import structured
from sparsify.costs.samples import FEW_ROWS, Sample, Workload
from sparsify.errors import ProfileError
from sparsify.ops import block_lists, feed_forward
from sparsify.ops.attention import AttentionCall
from sparsify.ops.cache import CacheDecodeCall
from sparsify.ops.estimate import Estimate
from sparsify.ops.limits import cdiv
from sparsify.ops.selection import SelectCall

BLOCK = 128
_PLAIN_SECONDS = 5e-3  # calls longer than this are timed one by one
_GRAPH_SECONDS = 3e-3  # shorter ones so many in a graph that it takes about so long
_MOST_CALLS = 64
_LOAD_SECONDS = 0.15
_MOST_RUNS = 24
_REPLAYS = 5
_CACHES = 3  # operands that a model would read from memory are copied until they fill the L2 cache so often
_FFN_BLOCKS = 8


@dataclass(frozen=True)
class Call:
    """A workload made ready.

    run: does `count` calls.
    count: calls of one run.
    workload: with the density that block lists really have.
    """

    run: Callable[[], Any]
    count: int
    workload: Workload


@torch.no_grad()
def measure(workload: Workload, device: str, *, replays: int = _REPLAYS) -> Sample:
    """Median seconds of a call.

    Args:
        device: "cuda" or "cpu".

    Raises:
        ProfileError: nothing here runs this call.
    """
    call = prepare(workload, device)
    load = _LOAD_SECONDS if any(one.flops != 0 or one.flops8 != 0 for one in workload.works()) else 0.0
    return Sample(call.workload, seconds(call.run, device, replays=replays, under_load=load, short=call.count > 1) / call.count)


@torch.no_grad()
def seconds(
    run: Callable[[], Any], device: str, *, replays: int = _REPLAYS, under_load: float = _LOAD_SECONDS, short: bool = False
) -> float:
    """Median seconds of `run`, whatever it compiles or allocates at first left out.

    Args:
        short: a graph is made however long the call takes at first: many small kernels wait for the host.
        under_load: on a GPU calls are repeated for so long, and the second half counts: at the power limit the clock falls within tens of
            milliseconds, and a model keeps the device there.
    """
    if device != "cuda":
        run()
        return statistics.median(_wall(run) for _ in range(replays))
    run()
    first = _events(run)
    if first >= _PLAIN_SECONDS and not short:
        return _settled(run, max(2, min(_MOST_RUNS, math.ceil(under_load / first))))
    calls = max(1, min(_MOST_CALLS, int(_GRAPH_SECONDS / max(first, 1e-6))))
    graph = _graph(run, calls)
    graph.replay()
    return _settled(graph.replay, max(replays, int(under_load / _events(graph.replay)))) / calls


def _wall(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return max(time.perf_counter() - began, 1e-9)


def _events(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _settled(run: Callable[[], Any], count: int) -> float:
    """Median seconds over the second half of `count` runs."""
    times = _back_to_back(run, count)
    return statistics.median(times[len(times) // 2 :])


def _back_to_back(run: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` runs, waited for at the end."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]


def _graph(run: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some calls, which ran before. Raises ProfileError where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a stream's first call allocates, such as a product's workspace
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError as error:
        # times of calls that are not captured hold the host's time: they say nothing about the kernels
        raise ProfileError(f"cannot be captured in a CUDA graph: {str(error).splitlines()[0][:200]}", where="timing") from error
    return graph


def prepare(workload: Workload, device: str) -> Call:
    """Operands and the function that runs the workload; random numbers, since time does not depend on them."""
    makers: dict[str, Callable[[Workload, str], Call]] = {
        "attention": _attention,
        "select": _select,
        "whole": _whole,
        "decode": _decode,
        "ffn": _ffn,
        "linear": _linear,
        "elementwise": _elementwise,
    }
    return makers[workload.kind](workload, device)


@functools.cache
def _generator(device: str) -> torch.Generator:
    """One of our own, which no graph's capture knows of."""
    return torch.Generator(device).manual_seed(0)


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype, generator=_generator(device))


def operands(workload: Workload, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random ones; what thresholds choose among has structure."""
    if workload.pool == "row" and workload.kind in ("select", "whole"):
        heads = {"heads": workload.query_heads, "kv_heads": workload.kv_heads, "dim": workload.head_dim}
        alike = structured(workload.key_len, **heads, dtype=workload.torch_dtype, device=device)
        query, key, value = (one.expand(workload.batch, -1, -1, -1).contiguous() for one in alike)
        return query[:, :, workload.key_len - workload.query_len :], key, value
    make = functools.partial(_random, device, workload.torch_dtype, workload.batch)
    key_shape = (workload.kv_heads, workload.key_len, workload.head_dim)
    return make(workload.query_heads, workload.query_len, workload.head_dim), make(*key_shape), make(*key_shape)


def random_lists(workload: Workload, device: str) -> tuple[Tensor, Tensor, float]:
    """Counts, rising indices and their density: the first block and the diagonal always, others at random."""
    assert workload.density is not None
    rows, columns = cdiv(workload.query_len, BLOCK), cdiv(workload.key_len, BLOCK)
    offset = columns - rows
    keep = torch.rand(workload.batch, workload.query_heads, rows, columns, device=device, generator=_generator(device)) < workload.density
    keep |= torch.eye(rows, columns, dtype=torch.bool, device=device).roll(offset, -1)
    keep[..., 0] = True
    keep.tril_(offset)
    counts = keep.sum(-1, dtype=torch.int32)
    order = torch.empty(keep.shape, dtype=torch.int16, device=device)
    for head in range(workload.query_heads):  # a head at a time: positions are 8 bytes each
        order[:, head] = keep[:, head].to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int16)
    density = float(counts.sum()) / (workload.batch * workload.query_heads * sum(min(columns, offset + r + 1) for r in range(rows)))
    return counts, order, density


def _attention_call(
    workload: Workload, operands: tuple[Tensor, Tensor, Tensor], lists: Sequence[Tensor | None] = (None, None)
) -> AttentionCall:
    windows = (workload.window,) if workload.window else ()
    listed: dict[str, Any] = {"block_counts": lists[0], "block_indices": lists[1], "block_size": BLOCK}
    return AttentionCall(*operands, scale=workload.head_dim**-0.5, causal=True, windows=windows, sinks=workload.sinks, **listed)


def _kernel(name: str) -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
    """The attention op by one kernel, past the choice that the op makes."""
    if name == "hopper":
        from sparsify.backends.attention import hopper

        return hopper.launch
    if name in ("triton", "split"):  # few queries over many keys are split by themselves
        return triton.triton_attention
    if name == "cpp":
        return cpp.launch
    if name == "reference":
        return reference.attention
    raise ProfileError(f"no attention kernel {name!r}", where="timing")


def _attention(workload: Workload, device: str) -> Call:
    query, key, value = operands(workload, device)
    if workload.kernel == "sdpa":
        if workload.window or workload.density is not None or workload.query_len != workload.key_len:
            raise ProfileError("SDPA has no windows, lists or chunks", where=str(workload.as_record()))
        grouped = workload.query_heads != workload.kv_heads
        return Call(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped), 1, workload)
    lists: Sequence[Tensor | None] = (None, None)
    if workload.density is not None:
        *lists, density = random_lists(workload, device)
        workload = replace(workload, density=density)
    call, kernel = _attention_call(workload, (query, key, value), lists), _kernel(workload.kernel)
    return Call(lambda: kernel(call), 1, workload)


def _selection(workload: Workload, query: Tensor, key: Tensor, density: float) -> SelectCall:
    estimate: dict[str, Any] = {"estimate": Estimate.from_names(workload.variants), "stride": workload.stride, "block_size": BLOCK}
    rule: dict[str, Any] = {"pool": workload.pool, "threshold": (workload.threshold,), "min_share": workload.min_share}
    rule |= {"density": 0.0 if workload.pool == "row" else density}
    rule |= {name: getattr(workload, name) for name in ("refine_stride", "coarse_threshold") if workload.refine_stride}
    return SelectCall(query, key, scale=workload.head_dim**-0.5, causal=True, **rule, **estimate)


def _selector(device: str) -> Callable[[SelectCall], tuple[Tensor, Tensor]]:
    if device == "cuda":
        from sparsify.backends.select import stages

        return stages.select_blocks
    return dispatch.serve("select_blocks")


def _shares(call: SelectCall, device: str) -> dict[str, float]:
    """Of the causal blocks, what a selection in two stages lists and what it keeps."""
    if device == "cuda":
        from sparsify.backends.select import stages
        from sparsify.backends.select.triton import LIMITS

        counts, _ = lists = call.empty_lists()
        listed, _ = stages.two_stages(call, lists, None, LIMITS)
    else:
        counts, _ = dispatch.serve("select_blocks")(call)
        listed = select_reference.group_lists(call.stages[0]).sum(-1)
    shares = {"density": counts, "listed": listed}
    return {name: block_lists.density(found, call.query_len, call.key_len, 0, BLOCK)[1] for name, found in shares.items()}


def _select(workload: Workload, device: str) -> Call:
    query, key, _ = operands(workload, device)
    call, select = _selection(workload, query, key, 0.1), _selector(device)
    if workload.refine_stride:
        workload = replace(workload, **_shares(call, device))
    return Call(lambda: select(call), 1, workload)


def _whole(workload: Workload, device: str) -> Call:
    query, key, value = operands(workload, device)
    assert workload.density is not None
    call, select, kernel = _selection(workload, query, key, workload.density), _selector(device), _kernel(workload.kernel)

    def run() -> Tensor:
        return kernel(_attention_call(workload, (query, key, value), select(call)))[0]

    counts, _ = select(call)
    density = block_lists.density(counts, workload.query_len, workload.key_len, 0, BLOCK)[1]
    return Call(run, 1, replace(workload, density=density))


def _copies(size: int, device: str) -> int:
    """How many operands of `size` bytes a loop has to go through, so that each comes from memory."""
    if device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MOST_CALLS, math.ceil(_CACHES * cache / size)))


def _decode(workload: Workload, device: str) -> Call:
    dtype = workload.torch_dtype
    size = 2 * workload.batch * workload.kv_heads * workload.key_len * workload.head_dim * dtype.itemsize
    count = _copies(size, device)
    caches = [
        tuple(_random(device, dtype, workload.batch, workload.kv_heads, workload.key_len, workload.head_dim) for _ in range(2))
        for _ in range(count)
    ]
    token = lambda heads: _random(device, dtype, workload.batch, 1, heads, workload.head_dim).transpose(1, 2)
    query = token(workload.query_heads)
    if workload.kernel == "sdpa":
        grouped = workload.query_heads != workload.kv_heads
        return Call(lambda: [F.scaled_dot_product_attention(query, k, v, enable_gqa=grouped) for k, v in caches], count, workload)
    if workload.kernel == "masked":  # as transformers calls it: a mask tensor, keys and values repeated for the query heads
        group = workload.query_heads // workload.kv_heads
        mask = torch.zeros(workload.batch, 1, 1, workload.key_len, dtype=dtype, device=device)
        repeated = lambda t: t[:, :, None].expand(-1, -1, group, -1, -1).reshape(workload.batch, workload.query_heads, *t.shape[2:])
        return Call(
            lambda: [F.scaled_dot_product_attention(query, repeated(k), repeated(v), attn_mask=mask) for k, v in caches], count, workload
        )
    if workload.kernel != "cache":
        calls, kernel = [_attention_call(workload, (query, k, v)) for k, v in caches], _kernel(workload.kernel)
        return Call(lambda: [kernel(call) for call in calls], count, workload)
    key, value = token(workload.kv_heads), token(workload.kv_heads)
    filled = _cache_state(workload, device)
    options: dict[str, Any] = {"pinned": 0, "scale": workload.head_dim**-0.5, "softcap": 0.0, "window": 0, "sinks": 0}
    steps = [CacheDecodeCall(query, key, value, k, v, *filled, **options) for k, v in caches]
    return Call(lambda: [step.run() for step in steps], count, workload)


def _cache_state(workload: Workload, device: str) -> tuple[Tensor, ...]:
    """Positions, counts, seen and length of a layer whose slots are full."""
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    positions = torch.arange(workload.key_len, **ints).expand(workload.batch, workload.kv_heads, -1).contiguous()
    counts = torch.full((workload.batch, workload.kv_heads), workload.key_len, **ints)
    return positions, counts, counts[:, 0].clone(), torch.tensor(workload.key_len, dtype=torch.int64, device=device)


def _ffn(workload: Workload, device: str) -> Call:
    dtype, blocks = workload.torch_dtype, _FFN_BLOCKS if device == "cuda" else 4
    draw = lambda *shape: _random(device, dtype, *shape).mul_(0.02)
    wide = (workload.outputs, workload.inputs)
    weights = [(draw(*wide), draw(*wide), draw(workload.inputs, workload.outputs), draw(workload.inputs)) for _ in range(blocks)]
    x = _random(device, dtype, workload.rows, 1, workload.inputs)
    flags = torch.zeros(blocks, workload.rows, dtype=torch.int32, device=device)
    left_out = round(workload.skipped * blocks)
    flags[[int((i + 0.5) * blocks / left_out) for i in range(left_out)]] = 1
    fixed = {
        "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": 1e-5, "post_norm": "none", "post_eps": 0.0,
        "scale": 1.0, "threshold": 2.0, "skip_next": 1, "version": feed_forward.VERSION,
    }  # fmt: skip

    def run() -> Tensor:
        y = x
        for (up, gate, down, norm), remaining in zip(weights, flags, strict=True):
            y, _ = feed_forward.ffn(y, y, remaining, up, down, gate=gate, norm_weight=norm, **fixed)
        return y

    return Call(run, blocks, replace(workload, skipped=left_out / blocks))


def _linear(workload: Workload, device: str) -> Call:
    dtype = workload.torch_dtype
    count = _copies(workload.inputs * workload.outputs * dtype.itemsize, device) if workload.rows <= FEW_ROWS else 1
    weights = [_random(device, dtype, workload.outputs, workload.inputs) for _ in range(count)]
    x = _random(device, dtype, workload.rows, workload.inputs)
    return Call(lambda: [F.linear(x, weight) for weight in weights], count, workload)


def _elementwise(workload: Workload, device: str) -> Call:
    elements = max(1, workload.size // (3 * workload.torch_dtype.itemsize))
    first, second, out = (torch.zeros(elements, dtype=workload.torch_dtype, device=device) for _ in range(3))
    return Call(lambda: torch.add(first, second, out=out), 1, replace(workload, size=3 * elements * workload.torch_dtype.itemsize))


@torch.no_grad()
def ceilings(device: str, *, small: bool = False) -> dict[str, float]:
    """FLOP/s of a large matrix product, bytes/s of a copy and of a sum, the better of both, and seconds of an empty launch.

    Args:
        small: sizes that a CPU does in no time.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side, size = (8192, 1 << 30) if not small else (256, 1 << 22)
    first, second = (_random(device, dtype, side, side) for _ in range(2))
    product = seconds(lambda: torch.mm(first, second), device, replays=9, under_load=0.4)
    found = {"flops": 2 * side**3 / product}
    source = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    moved = [
        2 * size / seconds(lambda: target.copy_(source), device),
        3 * size / seconds(lambda: torch.add(source, source, out=target), device),
    ]
    moved[1] *= 2 / 3  # both inputs are one tensor, which is read once
    found["bandwidth"] = max(moved)
    one = torch.zeros(1, device=device)
    calls = 200
    found["launch"] = _host(lambda: [one.add_(1) for _ in range(calls)], device) / calls
    return found


def _host(run: Callable[[], Any], device: str) -> float:
    """Seconds between launches that wait for the host."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)
