"""The cells of the cost grid: methods × lengths 1K to 256K × densities × batches, and which of them a profile is fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from sparsify.costs.samples import Workload

K = 1024
LENGTHS = tuple(K << i for i in range(9))
FITTED_LENGTHS = {1 * K, 4 * K, 16 * K, 64 * K, 128 * K}  # the others, and the longest one beyond them, are only predicted
DENSITIES = (0.05, 0.1, 0.2, 0.5)
OTHER_DENSITIES = (0.03, 0.15, 0.35)  # only predicted
ESTIMATES = tuple(
    (stride, variants)
    for stride in (8, 16)
    for variants in ((), ("half",), ("group",), ("int8",), ("pair",), ("pair", "int8"), ("quad", "int8"))
)
# under the row rule, in one stage: the two stages of the default by themselves, what stands in for both, and two whose cells are larger
ROW_RULE: dict[str, Any] = {"pool": "row", "threshold": 0.8, "min_share": 0.05}
ROW_ESTIMATES = (
    (8, ("quad", "int8", "peak")),
    (4, ("quad", "int8", "peak")),
    (4, ("pair", "int8", "peak")),
    (8, ("pair", "int8", "peak")),
    (8, ()),
)
# in two stages, 8 → 4: thresholds of the first, which decide how many blocks the second scores
COARSE, OTHER_COARSE = (0.8, 0.95), (0.9,)  # the other one is only predicted
MATRICES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
VOCAB = 128256


def prompt(kind: str, length: int, kernel: str = "", **more) -> Workload:
    return Workload(kind, kernel, query_len=length, key_len=length, **more)


def dense(kernels: tuple[str, ...]) -> list[Workload]:
    """Dense causal attention: every length, batches, a small model's heads, head dim 64, and chunks of a long prompt."""
    cells = [prompt("attention", n, kernel) for n in LENGTHS for kernel in kernels]
    exact = [kernel for kernel in kernels if kernel != "triton"]
    batches = ((1 * K, 4), (2 * K, 8), (4 * K, 4), (8 * K, 4), (16 * K, 2))
    cells += [prompt("attention", n, kernel, batch=batch) for n, batch in batches for kernel in exact]
    cells += [prompt("attention", n, kernel, query_heads=8, kv_heads=2) for n in (2 * K, 4 * K, 16 * K, 32 * K) for kernel in exact]
    cells += [prompt("attention", n, kernel, head_dim=64) for n in (4 * K, 8 * K, 64 * K) for kernel in kernels]
    chunks = ((512, 64 * K), (2 * K, 16 * K), (4 * K, 128 * K), (4 * K, 32 * K))
    ours = [kernel for kernel in kernels if kernel != "sdpa"]
    return cells + [Workload("attention", kernel, query_len=rows, key_len=n) for rows, n in chunks for kernel in ours[:1]]


def sparse(kernels: tuple[str, ...]) -> list[Workload]:
    """Block lists at given densities, windows, estimates, and the whole sparse call."""
    main, *others = [kernel for kernel in kernels if kernel != "sdpa"]
    lists = [prompt("attention", n, main, density=d) for n in LENGTHS[2:] for d in DENSITIES + OTHER_DENSITIES]
    lists += [prompt("attention", n, main, density=d, batch=4) for n in (4 * K, 8 * K) for d in (0.1, 0.3)]
    lists += [prompt("attention", n, main, density=d, head_dim=64) for n in (16 * K, 64 * K) for d in (0.05, 0.2)]
    lists += [prompt("attention", n, other, density=d) for other in others for n in LENGTHS[2:-1] for d in (0.05, 0.1, 0.3)]
    windows = [prompt("attention", n, main, window=w, sinks=4) for n in LENGTHS[3:] for w in (K, 4 * K) if n > w]
    windows += [prompt("attention", n, other, window=K, sinks=4) for other in others for n in LENGTHS[3:]]
    estimates = [prompt("select", n, stride=stride, variants=variants) for n in LENGTHS[1:] for stride, variants in ESTIMATES]
    estimates += [prompt("select", n, stride=stride, batch=4) for n in (4 * K, 8 * K) for stride in (8, 16)]
    whole = [prompt("whole", n, main, stride=stride, density=d) for n in LENGTHS[2:] for stride in (8, 16) for d in (0.05, 0.1, 0.2)]
    whole += [prompt("whole", n, main, stride=16, variants=("half",), density=0.1) for n in LENGTHS[3:]]
    whole += [prompt("whole", n, main, stride=8, variants=("pair", "int8"), density=0.1) for n in LENGTHS[2:]]
    whole += [prompt("whole", n, main, stride=8, density=0.1, batch=4) for n in (4 * K, 8 * K)]
    return lists + windows + estimates + whole


def selections() -> list[Workload]:
    """Under the row rule: in one stage, and in two."""
    one = [prompt("select", n, stride=stride, variants=variants, **ROW_RULE) for n in LENGTHS[2:] for stride, variants in ROW_ESTIMATES]
    staged: dict[str, Any] = {**ROW_RULE, "stride": 8, "refine_stride": 4}
    two = [
        prompt("select", n, **staged, variants=("quad", "int8", "peak"), coarse_threshold=coarse)
        for n in LENGTHS[3:]
        for coarse in COARSE + OTHER_COARSE
    ]
    return one + two + [prompt("select", n, **staged, variants=("pair", "int8", "peak")) for n in LENGTHS[4:]]


def decode(kernels: tuple[str, ...]) -> list[Workload]:
    cells = [Workload("decode", kernel, key_len=n, batch=batch) for n in LENGTHS for kernel in kernels for batch in (1, 8)]
    return cells + [Workload("decode", kernel, key_len=n, batch=4) for n in (8 * K, 32 * K) for kernel in kernels]


def masked() -> list[Workload]:
    """Decode steps of SDPA with a mask tensor, which a static cache or padding gives eager models."""
    return [
        Workload("decode", "masked", key_len=n, batch=batch)
        for n in (4 * K, 8 * K, 32 * K, 128 * K)
        for batch in (1, 8)
        if n * batch <= 256 * K
    ]


def layers() -> list[Workload]:
    """What a model does beside attention: skipped blocks, linear layers of many and of few rows, sums."""
    cells = [Workload("ffn", rows=rows, inputs=4096, outputs=14336, skipped=share) for rows in (1, 8, 32) for share in (0.0, 0.25, 0.5)]
    cells += [Workload("linear", rows=rows, inputs=i, outputs=o) for rows in (K, 2 * K, 4 * K, 8 * K, 32 * K) for i, o in MATRICES]
    cells += [Workload("linear", rows=rows, inputs=i, outputs=o) for rows in (1, 8, 32) for i, o in (*MATRICES, (4096, VOCAB))]
    return cells + [Workload("elementwise", size=size) for size in (3 << 16, 3 << 20, 3 << 24, 3 << 26, 3 << 28)]


_KERNELS = ("sdpa", "hopper", "triton")
PARTS: dict[str, Callable[[], list[Workload]]] = {
    "layers": layers,
    "decode": lambda: decode(("sdpa", "cache", "split")) + masked(),
    "dense": lambda: dense(_KERNELS),
    "sparse": lambda: sparse(_KERNELS),
    "selections": selections,
}


def grid(device: str, small: bool = False, only: Collection[str] = ()) -> list[Workload]:
    """Every cell, the quick ones first, so that a run that is cut short loses the long ones.

    Args:
        device: "cuda" or "cpu". small: sizes that a CPU does in a minute, of the same kinds, for a test of the benchmark itself.
        only: names in `PARTS`; none: all of them. Small cells are no parts.
    """
    if device != "cuda" or small:
        return _tiny("hopper" if device == "cuda" else "reference")
    return sorted((cell for name, cells in PARTS.items() if name in (only or PARTS) for cell in cells()), key=weight)


def identity(cell: Workload, asked: float | None) -> Workload:
    """The cell of the grid that was measured, without what was found when it ran.

    Args:
        asked: the density that the cell's lists were made for.
    """
    return replace(cell, density=asked, listed=None)


def _tiny(kernel: str) -> list[Workload]:
    small = {"query_heads": 2, "kv_heads": 1, "head_dim": 32, "dtype": "float32"}
    cells = [prompt("attention", n, name, **small) for n in (128, 256, 512) for name in ("sdpa", kernel)]
    cells += [prompt("attention", 512, kernel, density=d, **small) for d in (0.3, 0.6)]
    cells += [prompt("attention", 512, kernel, window=128, sinks=4, **small), prompt("select", 512, stride=8, **small)]
    cells += [
        prompt("select", 2048, stride=8, refine_stride=stride, variants=("quad", "int8", "peak"), **ROW_RULE, **small) for stride in (0, 4)
    ]
    cells += [prompt("whole", 512, kernel, stride=16, density=0.3, **small)]
    cells += [Workload("decode", name, key_len=n, **small) for n in (128, 512) for name in ("sdpa", "cache")]
    cells += [Workload("ffn", rows=1, inputs=64, outputs=128, skipped=share, dtype="float32") for share in (0.0, 0.5)]
    cells += [Workload("linear", rows=rows, inputs=64, outputs=128, dtype="float32") for rows in (1, 256)]
    return [*cells, Workload("elementwise", size=1 << 16, dtype="float32")]


def weight(cell: Workload) -> float:
    """About how many seconds a cell takes, for their order alone."""
    pairs = cell.batch * cell.query_heads * cell.query_len * (cell.key_len - cell.query_len / 2) * cell.head_dim
    if cell.kind == "select":
        return pairs / cell.stride + (pairs / cell.refine_stride if cell.refine_stride else 0)
    return pairs * (cell.density or (cell.window / cell.key_len if cell.window else 1)) * 4


def fitted(cell: Workload, asked: float | None = None) -> bool:
    """Whether a cell belongs to the part that a profile is fitted on. The other part has other lengths or other densities.

    Args:
        asked: the density that the cell's lists were made for; the one that they have is a little higher.
    """
    if cell.kind == "whole":  # sums of two families: what they cost together is only predicted
        return False
    if cell.kind in ("linear", "ffn"):
        return cell.rows not in (8, 2 * K, 32 * K) and cell.skipped != 0.25
    if cell.kind == "elementwise":
        return cell.size != 3 << 24
    if cell.key_len >= K and cell.key_len not in FITTED_LENGTHS:
        return False
    if cell.kind == "select":  # of which a density is found, not asked for
        return not cell.refine_stride or cell.coarse_threshold in COARSE
    return cell.density is None or any(math.isclose(cell.density if asked is None else asked, d) for d in DENSITIES) or cell.key_len < K


def compile_jobs(cells: list[Workload]) -> list[list[Workload]]:
    """Cells grouped so that every kernel that the grid needs is compiled by one of the groups, which may run side by side."""
    jobs: dict[tuple, list[Workload]] = {}
    for cell in cells:
        if cell.kind in ("linear", "elementwise") or cell.kernel in ("sdpa", "masked"):
            continue
        if cell.kind in ("select", "whole"):
            # kernels depend on the length and on query heads per KV head, not on how many heads there are
            few = replace(cell, kind="select", kernel="", density=None, batch=1, query_heads=cell.query_heads // cell.kv_heads, kv_heads=1)
            few = replace(few, coarse_threshold=COARSE[-1])
            jobs.setdefault(("select", cell.stride, cell.variants, cell.pool, cell.refine_stride), []).append(few)
        elif cell.key_len <= 64 * K:
            clauses = cell.kind, cell.kernel, cell.head_dim, cell.density is not None, cell.window > 0
            jobs.setdefault(clauses, []).append(cell)
    return [list(dict.fromkeys(group)) for group in jobs.values()]
