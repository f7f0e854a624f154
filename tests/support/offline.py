"""Compiles generated kernels for a GPU architecture on a machine without a GPU, and reads what they cost.

ptxas and cuobjdump come in Triton's wheel. Triton does not reject too much shared memory at compile time, so tests compare
`Resources.shared` with `SHARED_LIMIT` themselves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.backends.codegen.arguments import Argument

# bytes of shared memory that one thread block may use, by compute capability (CUDA C++ Programming Guide, technical specifications)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """registers: per thread. spilled, shared: bytes. wgmma, mma, cp_async: instructions in the PTX; wide_streams, narrow_streams: loads of
    what is read once (evict_first), of 16 bytes a thread and of fewer; loop: those of the longest loop in the PTX, how often each."""

    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    cp_async: int
    wide_streams: int = 0
    narrow_streams: int = 0
    loop: Mapping[str, int] = field(default_factory=dict)


BUDGETS = Path(__file__).parents[1] / "goldens" / "kernels" / "budgets"


def within_budget(name: str, used: Resources) -> None:
    """Fails when a kernel takes more registers, spilled bytes or shared memory than tests/goldens/kernels/budgets allows it.

    ptxas comes with Triton: each release has a book of its own, and one without is not compared. SPARSIFY_ACCEPT=1 writes what the kernel
    takes; run that without -n, in one process.
    """
    import triton

    takes = {"registers": used.registers, "spilled": used.spilled, "shared": used.shared}
    book = BUDGETS / f"{triton.__version__}.json"
    kernels = json.loads(book.read_text()) if book.exists() else {}
    if os.environ.get("SPARSIFY_ACCEPT") == "1":
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted({**kernels, name: takes}.items()))
        book.write_text(f"{{\n{rows}\n}}\n")
        return
    if not book.exists():
        return
    allowed = kernels.get(name)
    if allowed is None:
        raise AssertionError(f"{name} has no budget: SPARSIFY_ACCEPT=1 writes one")
    over = {key: f"{takes[key]} > {allowed[key]}" for key in takes if takes[key] > allowed[key]}
    if over:
        raise AssertionError(f"{name} outgrew its budget: {over}")


def compile_kernel(
    kernel,
    arguments: Iterable[Argument],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    constexprs: Mapping[str, object] | None = None,
) -> Resources:
    """Compiles one `triton.jit` function.

    Args:
        arguments: in order. Those that are multiples of 16 at a real launch say so; otherwise another, worse kernel comes out.
        arch: compute capability times ten: 80, 90, 100.
        constexprs: values of the `constexpr` arguments, and of others that a call makes constants.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    listed, values = list(arguments), dict(constexprs or {})
    signature = {argument.name: "constexpr" if argument.name in values else argument.type for argument in listed}
    assert list(signature) == list(kernel.arg_names)
    attributes = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(listed) if argument.aligned and argument.name not in values}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages})
    ptx = compiled.asm["ptx"]
    registers, spilled = _usage(compiled.asm["cubin"])
    streams = re.findall(r"ld\.global\S*evict_first\S*", ptx)
    wide = sum(load.endswith((".v4.b32", ".v2.b64")) for load in streams)
    return Resources(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),
        cp_async=ptx.count("cp.async"),
        wide_streams=wide,
        narrow_streams=len(streams) - wide,
        loop=_longest_loop(ptx),
    )


def _longest_loop(ptx: str) -> Counter[str]:
    """Instructions between the label and the branch back to it that lie furthest apart."""
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    spans = [(labels[found[1]], i) for i, line in enumerate(lines) if (found := re.search(r"\bbra(?:\.uni)?\s+(\S+);", line))]
    begin, end = max(((begin, end) for begin, end in spans if begin < end), key=lambda span: span[1] - span[0], default=(0, 0))
    statements = (re.sub(r"^@!?%p\d+\s+", "", one.strip(" {}\t")) for line in lines[begin:end] for one in line.split(";"))
    return Counter(one.split()[0] for one in statements if one and not one.startswith((".", "$")) and " " in one.replace("\t", " "))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread, where spilled registers go."""
    import triton

    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {done.stdout}{done.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
