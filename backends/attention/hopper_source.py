"""Gluon source text for Hopper attention: a spec in, readable source out; no GPU and no Triton needed.

The text is a template whose `#if name` … `#else` … `#end` lines keep or drop what lies between them, so that a kernel holds only
the clauses that its spec asks for. docs/kernels.md tells how the kernel works.
"""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass, field

from sparsify.backends.attention.hopper_consumer import CONSUMER, KERNEL
from sparsify.backends.attention.hopper_producer import PRODUCER
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
        "LOAD": "tma.async_copy_global_to_shared",
        "STORE": "tma.async_copy_shared_to_global",
        "BARRIER": "gl.thread_barrier",
        "VIEW": "._reinterpret",
    },
    (3, 7): {
        "LOAD": "tma.async_copy_global_to_shared",
        "STORE": "tma.async_copy_shared_to_global",
        "BARRIER": "gl.barrier",
        "VIEW": "._reinterpret",
    },
    (3, 8): {"LOAD": "tma.async_load", "STORE": "tma.async_store", "BARRIER": "gl.barrier", "VIEW": "._reinterpret"},
    (3, 9): {"LOAD": "tma.async_load", "STORE": "tma.async_store", "BARRIER": "gl.barrier", "VIEW": ".reinterpret"},
}


def generate(spec: GluonSpec, triton_release: tuple[int, int] = (3, 6)) -> str:
    """The module's text. Its kernel is `attention`.

    Args:
        triton_release: major and minor number; a key of `DIALECTS`.

    Raises:
        KernelError: the spec contradicts itself or its rings do not fit in shared memory.
    """
    _check(spec)
    tuning = spec.tuning
    flags = {
        "causal": spec.causal,
        "lists": spec.lists,
        "window": spec.windows != "none",
        "window_per_head": spec.windows == "heads",
        "sinks": spec.windows != "none" and spec.sinks and not spec.key_flags,
        "flag_sinks": spec.windows != "none" and spec.key_flags,
        "any_sinks": spec.windows != "none" and (spec.sinks or spec.key_flags),
        "key_flags": spec.key_flags,
        "bounded": spec.windows != "none" or spec.key_flags,
        "segments": spec.segments,
        "start": spec.start,
        "softcap": spec.softcap,
        "sink_logits": spec.sink_logits,
        "halves": tuning.key_tile == 64,
        "value_delay": tuning.value_delay == 1,
        "output_in_query": tuning.output_in_query,
        "late_release": tuning.output_in_query and tuning.query_stages > 1,
        "query_registers": tuning.query_registers,
        "rows_first": tuning.order == "rows",
    }
    names = DIALECTS[triton_release] | {
        "DESCRIPTION": spec.describe(),
        "DTYPE": {"bf16": "bfloat16", "fp16": "float16"}[spec.dtype],
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.value_dim,
        "KEY_TILE": tuning.key_tile,
        "KEY_STAGES": tuning.key_stages,
        "VALUE_STAGES": tuning.value_stages,
        "QUERY_STAGES": tuning.query_stages,
        "CONSUMER_REGISTERS": tuning.consumer_registers,
        "PRODUCER_REGISTERS": tuning.producer_registers,
        # lengths change from call to call: one binary serves them all
        "RUNTIME": ", ".join(f'"{name}"' for name, type_ in argument_types(spec).items() if type_ == "i32"),
    }
    names |= _assembly(spec.value_dim // 2)
    names |= {"COLUMNS_APART": _apart(tuning.key_tile), "OUTPUT_APART": _apart(spec.value_dim)}
    return string.Template(expand(PRODUCER + CONSUMER + KERNEL, flags)).substitute(names)


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
        "MOVE": f"{{.reg .pred p, q; .reg .f32 a, b, c, d; {outgrown}{moved}@!q bra.uni KEEP; {join}KEEP: }}",
        "MOVE_OPERANDS": "=&f,=&f,=&r,=&r,f,f,f,f",
        "SHRINK": f"{{.reg .pred p; setp.eq.u32 p, ${3 * count}, 0; @p bra.uni KEEP; {products} KEEP: }}",
        "SHRINK_OPERANDS": ",".join(operands),
        "SHRINK_PACK": str(count),
    }


def expand(template: str, flags: dict[str, bool]) -> str:
    """Keeps or drops the lines between `#if name` (or `#if not name`), `#else` and `#end`, which nest.

    Raises:
        KernelError: an unknown name, or an `#else` or `#end` without its `#if`.
    """
    kept: list[str] = []
    stack: list[bool] = []
    for line in template.splitlines():
        words = line.split()
        if words[:1] == ["#if"]:
            if words[-1] not in flags:
                raise KernelError(f"a template asks for the unknown clause {words[-1]}")
            stack.append(flags[words[-1]] != (words[1] == "not"))
        elif words in (["#else"], ["#end"]):
            if not stack:
                raise KernelError(f"a template has {words[0]} without #if")
            state = stack.pop()
            if words == ["#else"]:
                stack.append(not state)
        elif all(stack):
            kept.append(line)
    if stack:
        raise KernelError("a template has #if without #end")
    return "\n".join(kept) + "\n"


def argument_types(spec: GluonSpec) -> dict[str, str]:
    """Each run-time argument of the kernel, in order, with its type: q, k, v, out for descriptors, else a Triton type.

    The launcher passes arguments in this order, and a compile without a GPU takes its signature from here.
    """
    types = {"queries": "query", "keys": "key", "values": "value", "outputs": "output", "lse": "*fp32", "counter": "*i32"}
    if spec.lists:
        types |= {"counts": "*i32", "indices": "*i16"}
    if spec.key_flags:
        types |= {"flags": "*u8", "flag_tiles": "*u8"}
        if spec.windows != "none":
            types |= {"sink_tiles": "*i32"}
    if spec.segments:
        types |= {"segments": "*i32", "segment_low": "*i32", "segment_high": "*i32"}
    if spec.windows == "heads":
        types |= {"windows": "*i32"}
    if spec.start:
        types |= {"starts": "*i64"}
    if spec.sink_logits:
        types |= {"sink_logits": "*fp32"}
    types |= {"query_len": "i32", "key_len": "i32", "batch": "i32", "heads": "i32", "kv_heads": "i32"}
    types |= {"list_len": "i32"} if spec.lists else {}
    types |= {} if spec.start else {"start": "i32"}
    types |= {"window": "i32"} if spec.windows == "one" else {}
    types |= {"sinks": "i32"} if spec.windows != "none" and spec.sinks and not spec.key_flags else {}
    types |= {"scale": "fp32"}
    types |= {"cap": "fp32"} if spec.softcap else {}
    return types


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
