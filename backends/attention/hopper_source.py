"""Gluon source text for Hopper attention: a spec in, readable source out; no GPU and no Triton needed.

A kernel holds only the clauses that its spec asks for. docs/kernels.md tells how the kernel works.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

from sparsify.backends.attention.hopper_consumer import CONSUMER, KERNEL
from sparsify.backends.attention.hopper_producer import PRODUCER
from sparsify.backends.codegen.arguments import (
    NUMBERS,
    Argument,
    descriptor,
    floats,
    integers,
    parameters,
    pointers,
    present,
    unspecialised,
)
from sparsify.backends.codegen.template import render
from sparsify.errors import KernelError

QUERY_TILE = 128  # rows of one tile: two consumer warpgroups of 64
SHARED_LIMIT = 232448  # bytes of shared memory that one thread block may have on compute capability 9.0


@dataclass(frozen=True)
class GluonTuning:
    """What changes a kernel's speed and never its result (but for rounding).

    key_tile: keys of one turn of the loop, 64 or 128; a kept block of 128 keys is one or two turns.
    key_stages, value_stages, query_stages: depth of the rings in shared memory.
    value_delay: turns that V's load is issued after K's of the same block (0 or 1), so that the next K never waits for V's slot.
    output_in_query: the output leaves through the query's slot instead of a buffer of its own, which buys one more stage.
    query_registers: Q waits in registers, which saves its reads from shared memory with every block.
    order: "heads" finishes all rows of a KV head before the next (K and V stay in L2), "rows" takes the long rows of all heads first.
    consumer_registers, producer_registers: registers of a thread after the kernel's redistribution (setmaxnreg).
    """

    key_tile: int = 128
    key_stages: int = 2
    value_stages: int = 2
    query_stages: int = 2
    value_delay: int = 1
    output_in_query: bool = False
    query_registers: bool = False
    order: str = "heads"
    consumer_registers: int = 240
    producer_registers: int = 24


@dataclass(frozen=True)
class GluonSpec:
    """Everything that changes the generated text.

    dtype: "bf16" or "fp16". head_dim, value_dim: 64, 128 or 256, the tensors' own dims rounded up (the copy engine pads with zeros).
    lists: block lists are given; else every block that the clauses leave. windows: "none", "one" or "heads" (one per query head).
    sinks: keys below `sinks` are exempt from the window. start: query_start is a tensor. The rest: the op's operand of that name.
    """

    dtype: str = "bf16"
    head_dim: int = 128
    value_dim: int = 128
    causal: bool = True
    lists: bool = False
    windows: str = "none"
    sinks: bool = False
    key_flags: bool = False
    segments: bool = False
    start: bool = False
    softcap: bool = False
    sink_logits: bool = False
    tuning: GluonTuning = field(default_factory=GluonTuning)

    def shared_bytes(self) -> int:
        """Shared memory of the rings, without the few hundred bytes of barriers and messages."""
        tuning = self.tuning
        query = tuning.query_stages * QUERY_TILE * self.head_dim
        rings = tuning.key_tile * (tuning.key_stages * self.head_dim + tuning.value_stages * self.value_dim)
        output = 0 if tuning.output_in_query else QUERY_TILE * self.value_dim
        return 2 * (query + rings + output)

    def describe(self) -> str:
        """One phrase: `bf16, head dim 128, causal, block lists, window`."""
        words = [self.dtype, f"head dim {self.head_dim}" + ("" if self.value_dim == self.head_dim else f" and {self.value_dim}")]
        words += ["causal"] * self.causal + ["block lists"] * self.lists
        words += {"none": [], "one": ["window"], "heads": ["window per head"]}[self.windows] + ["sinks"] * self.sinks
        words += ["key flags"] * self.key_flags + ["segments"] * self.segments + ["query start"] * self.start
        words += ["softcap"] * self.softcap + ["sink logits"] * self.sink_logits
        return ", ".join(words)


# Gluon's names, by Triton release: it is experimental and renames things. A release that is not here was not tried.
DIALECTS = {
    (3, 6): {
        "load": "tma.async_copy_global_to_shared",
        "store": "tma.async_copy_shared_to_global",
        "barrier": "gl.thread_barrier",
        "view": "._reinterpret",
    },
    (3, 7): {
        "load": "tma.async_copy_global_to_shared",
        "store": "tma.async_copy_shared_to_global",
        "barrier": "gl.barrier",
        "view": "._reinterpret",
    },
    (3, 8): {"load": "tma.async_load", "store": "tma.async_store", "barrier": "gl.barrier", "view": "._reinterpret"},
    (3, 9): {"load": "tma.async_load", "store": "tma.async_store", "barrier": "gl.barrier", "view": ".reinterpret"},
}


def generate(spec: GluonSpec, triton_release: tuple[int, int] = (3, 6)) -> str:
    """The module's text. Its kernel is `attention`.

    Args:
        triton_release: major and minor number; a key of `DIALECTS`.

    Raises:
        KernelError: the spec contradicts itself or its rings do not fit in shared memory.
    """
    _check(spec)
    tuning, windowed, listed = spec.tuning, spec.windows != "none", arguments(spec)
    values = vars(spec) | vars(tuning) | DIALECTS[triton_release] | _assembly(spec.value_dim // 2)
    values |= {
        "description": spec.describe(),
        "number": NUMBERS[spec.dtype],
        "sinks": _counted_sinks(spec),
        "flag_sinks": windowed and spec.key_flags,
        "any_sinks": windowed and (spec.sinks or spec.key_flags),
        "bounded": windowed or spec.key_flags,
        "late_release": tuning.output_in_query and tuning.query_stages > 1,
        "columns_apart": _apart(tuning.key_tile),
        "output_apart": _apart(spec.value_dim),
        "parameters": parameters(listed),
        "unspecialised": unspecialised(listed),
    }
    return render(PRODUCER + CONSUMER + KERNEL, values)


def _counted_sinks(spec: GluonSpec) -> bool:
    """Whether the first keys are sinks; beside key flags those say which are."""
    return spec.windows != "none" and spec.sinks and not spec.key_flags


def _apart(columns: int) -> str:
    """The layout of a product's 64 x columns as [64, columns / 8, 4, 2]: as wgmma leaves it (PTX ISA, wgmma.mma_async)."""
    eights = [[0, 1 << bit, 0, 0] for bit in range((columns // 8).bit_length() - 1)]
    registers = [[0, 0, 0, 1], [8, 0, 0, 0], *eights]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return f"gl.DistributedLinearLayout({registers}, {lanes}, [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, {columns // 8}, 4, 2])"


def _assembly(count: int) -> dict[str, str]:
    """PTX that Gluon has no words for: branches that a warp takes by itself. count: a thread's elements of the output tile."""
    outgrown = "add.f32 a, $6, 0f41000000; setp.gt.f32 p, $4, a; add.f32 b, $7, 0f41000000; setp.gt.or.f32 q, $5, b, p; "
    moved = "mov.f32 $0, $6; mov.f32 $1, $7; vote.sync.any.pred q, q, 0xffffffff; selp.u32 $2, 1, 0, q; mov.u32 $3, $2; "
    join = "".join(
        f"mov.f32 c, ${4 + row}; "
        + "".join(f"shfl.sync.bfly.b32 d, c, {lane}, 31, 0xffffffff; max.f32 c, c, d; " for lane in (1, 2))
        + f"setp.gt.f32 p, c, {bound}; selp.f32 ${row}, c, ${6 + row}, p; "
        for row, bound in enumerate("ab")
    )
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    operands = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count + ["r"] * count
    return {
        "move": f"{{.reg .pred p, q; .reg .f32 a, b, c, d; {outgrown}{moved}@!q bra.uni KEEP; {join}KEEP: }}",
        "move_operands": "=&f,=&f,=&r,=&r,f,f,f,f",
        "shrink": f"{{.reg .pred p; setp.eq.u32 p, ${3 * count}, 0; @p bra.uni KEEP; {products} KEEP: }}",
        "shrink_operands": ",".join(operands),
        "shrink_pack": str(count),
    }


@functools.lru_cache(maxsize=512)
def arguments(spec: GluonSpec) -> tuple[Argument, ...]:
    """The kernel's arguments in order. Lengths change from call to call: one binary serves them all."""
    windowed, rows, keys = spec.windows != "none", QUERY_TILE // 2, spec.tuning.key_tile
    runtime = lambda *names: integers(*names, specialised=False)
    return (
        descriptor("queries", spec.dtype, 1, 1, rows, spec.head_dim),
        descriptor("keys", spec.dtype, 1, 1, keys, spec.head_dim),
        descriptor("values", spec.dtype, 1, 1, keys, spec.value_dim),
        descriptor("outputs", spec.dtype, 1, 1, rows, spec.value_dim),
        *pointers("fp32", "lse"),
        *pointers("i32", "counter"),
        *present(
            (spec.lists, [*pointers("i32", "counts"), *pointers("i16", "indices")]),
            (spec.key_flags, pointers("u8", "flags", "flag_tiles")),
            (spec.key_flags and windowed, pointers("i32", "sink_tiles")),
            (spec.segments, pointers("i32", "segments", "segment_low", "segment_high")),
            (spec.windows == "heads", pointers("i32", "windows")),
            (spec.start, pointers("i64", "starts")),
            (spec.sink_logits, pointers("fp32", "sink_logits")),
        ),
        *runtime("query_len", "key_len", "batch", "heads", "kv_heads"),
        *present(
            (spec.lists, runtime("list_len")),
            (not spec.start, runtime("start")),
            (spec.windows == "one", runtime("window")),
            (_counted_sinks(spec), runtime("sinks")),
        ),
        *floats("scale", *["cap"] * spec.softcap),
    )


def _check(spec: GluonSpec) -> None:
    tuning = spec.tuning
    if spec.shared_bytes() > SHARED_LIMIT - 1024:
        raise KernelError(f"the rings need {spec.shared_bytes()} bytes of shared memory", where=spec.describe(), hint="fewer stages")
    if tuning.output_in_query and spec.head_dim != spec.value_dim:
        raise KernelError("an output of another width than the query's does not fit in its slot", where=spec.describe())
    if tuning.value_delay not in (0, 1) or tuning.key_tile not in (64, 128) or tuning.order not in ("heads", "rows"):
        raise KernelError(f"a tuning that the template does not know: {dataclasses.asdict(tuning)}")
    if min(tuning.key_stages, tuning.value_stages) < 2:
        raise KernelError("rings of one stage would stall the producer behind its own delay", where=spec.describe())
