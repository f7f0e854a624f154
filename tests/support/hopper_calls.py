"""A matrix of calls for the Hopper attention kernels, small ones; on the device against the fp64 reference, poisoned outputs, twice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.variants import TUNINGS
from sparsify.backends.attention import hopper, reference
from sparsify.backends.attention.hopper_source import GluonTuning
from sparsify.ops.attention import AttentionCall

# relative error of the output (Frobenius norm) that rounding P and the output to the dtype explains
ERROR_LIMIT = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
LSE_LIMIT = 2e-3


@dataclass(frozen=True)
class Call:
    """One call of the op. layout: of the inputs; padding: "", "left", "right", "holes" or "row" (one batch row has no key at all)."""

    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    query_len: int = 512
    key_len: int = 512
    head_dim: int = 128
    value_dim: int = 0
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    density: float = 0.0
    windows: tuple[int, ...] = ()
    sinks: int = 0
    padding: str = ""
    segments: int = 0
    start: int | None = None
    softcap: float = 0.0
    sink_logits: bool = False
    layout: str = "bhnd"
    seq_major: bool = False
    inputs: str = "random"
    tuning: GluonTuning | None = field(default=None)
    seed: int = 0


def matrix() -> dict[str, Call]:
    """Every clause alone, the combinations that share code, and a fuzzed rest."""
    base, ragged = Call(), Call(query_len=1000, key_len=1000)
    cases = _clauses(base, ragged)
    for where in ("left", "right", "holes", "row"):
        cases[f"padding_{where}"] = replace(ragged, padding=where, batch=2)
        cases[f"padding_{where}_window"] = replace(ragged, padding=where, batch=2, windows=(200,), sinks=4)
        cases[f"padding_{where}_lists"] = replace(ragged, padding=where, batch=2, density=0.4)
    for head_dim, value_dim in ((64, 64), (96, 96), (192, 192), (256, 256), (192, 128), (80, 80), (64, 128), (128, 64)):
        call = replace(ragged, head_dim=head_dim, value_dim=value_dim)
        cases[f"dim_{head_dim}_{value_dim}"] = call
        cases[f"dim_{head_dim}_{value_dim}_lists"] = replace(call, density=0.4, batch=2)
    cases["dim_64_many"] = Call(heads=32, kv_heads=8, query_len=4096, key_len=4096, density=0.1, head_dim=64)
    cases["dim_256_flags"] = replace(ragged, head_dim=256, padding="left", density=0.5)
    for name, tuning in TUNINGS.items():
        cases[f"tuning_{name}"] = Call(heads=32, kv_heads=8, query_len=2000, key_len=2000, density=0.2, tuning=tuning)
        cases[f"tuning_{name}_dense"] = Call(heads=32, kv_heads=8, query_len=2000, key_len=2000, tuning=tuning)
    return cases | {f"fuzz_{seed}": _fuzz(seed) for seed in range(24)}


def _clauses(base: Call, ragged: Call) -> dict[str, Call]:
    """Clauses alone and by hand combined; a table, so as long as there are cases."""
    return {
        "causal": base,
        "not_causal": replace(base, causal=False),
        "ragged": ragged,
        "ragged_not_causal": replace(ragged, causal=False),
        "one_more": replace(base, query_len=129, key_len=129),
        "half_tile": replace(base, query_len=64, key_len=64),
        "chunk": replace(base, query_len=300, key_len=1000),
        "start_37": replace(base, query_len=300, key_len=1000, start=37),
        "start_0": replace(base, query_len=300, key_len=1000, start=0),
        "more_queries": replace(base, query_len=640, key_len=300),
        "lists": replace(base, density=0.3, key_len=1024, query_len=1024),
        "lists_ragged": replace(ragged, density=0.3),
        "lists_chunk": replace(base, density=0.4, query_len=300, key_len=1001, start=77),
        "lists_not_causal": replace(ragged, density=0.4, causal=False),
        "lists_mostly_empty": replace(ragged, density=0.03),
        "window": replace(ragged, windows=(100,)),
        "window_1": replace(ragged, windows=(1,)),
        "window_300_not_causal": replace(ragged, windows=(300,), causal=False),
        "window_sinks": replace(ragged, windows=(256,), sinks=4),
        "window_sinks_130": replace(ragged, windows=(256,), sinks=130),
        "window_per_head": replace(ragged, windows=(0, 100, 256, 2000), sinks=4),
        "window_lists": replace(ragged, windows=(300,), density=0.5, sinks=4),
        "window_chunk": replace(base, query_len=300, key_len=1001, windows=(130,), sinks=4),
        "softcap": replace(ragged, softcap=20.0),
        "sink_logits": replace(ragged, sink_logits=True),
        "sink_logits_empty_rows": replace(base, query_len=640, key_len=300, sink_logits=True),
        "softcap_lists": replace(ragged, softcap=20.0, density=0.4, sink_logits=True),
        "segments": replace(ragged, segments=5),
        "segments_lists": replace(ragged, segments=3, density=0.5),
        "segments_chunk": replace(base, query_len=300, key_len=1001, segments=4),
        "segments_padding": replace(ragged, segments=3, padding="left", batch=2),
        "everything": replace(ragged, segments=3, padding="left", batch=2, windows=(300,), sinks=4, density=0.6, softcap=20.0, start=9),
        "fp16": replace(ragged, dtype=torch.float16, density=0.4),
        "mha": replace(ragged, heads=3, kv_heads=3),
        "mqa_7": replace(ragged, heads=7, kv_heads=1, density=0.4),
        "batch_3": replace(ragged, batch=3, density=0.4),
        "seq_major": replace(ragged, batch=2, seq_major=True, layout="bnhd"),
        "fused": replace(ragged, batch=2, layout="fused"),
        "shared_batch": replace(ragged, batch=2, layout="expanded"),
        "huge": replace(ragged, inputs="huge"),
        "equal": replace(ragged, inputs="equal", density=0.3),
        "rising": replace(ragged, inputs="rising"),
        "rising_window": replace(ragged, inputs="rising", windows=(100,), sinks=4),
        "rising_fp16": replace(ragged, inputs="rising", dtype=torch.float16),
        "rising_64": replace(ragged, inputs="rising", head_dim=64),
        "rising_256": replace(ragged, inputs="rising", head_dim=256),
        "huge_fp16": replace(ragged, inputs="huge", dtype=torch.float16),
        "rising_lists": replace(ragged, inputs="rising", density=0.4),
        "minus_100": replace(ragged, inputs="low", density=0.3),
        "many_tiles": Call(heads=32, kv_heads=8, query_len=4096, key_len=4096, density=0.1),
        "many_dense_tiles": Call(heads=32, kv_heads=8, query_len=4000, key_len=4000),
        "many_short_tiles": Call(heads=32, kv_heads=8, query_len=4096, key_len=4096, density=0.02),
        "many_windows": Call(heads=32, kv_heads=8, query_len=4096, key_len=4096, windows=(300,), sinks=4),
    }


def _fuzz(seed: int) -> Call:
    draw = random.Random(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    flags = draw.random() < 0.3
    windows = () if draw.random() < 0.6 else (draw.choice([1, 77, 128, 129, 400]),)
    key_len = draw.randint(1, 1500)
    return Call(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        batch=draw.choice([1, 2]),
        query_len=draw.randint(64, 900),
        key_len=key_len,
        head_dim=draw.choice([64, 128]),
        causal=draw.random() < 0.8,
        density=draw.choice([0.0, 0.2, 0.6]),
        windows=windows,
        sinks=draw.choice([0, 4, 200]),
        padding=draw.choice(["left", "holes"]) if flags else "",
        segments=draw.choice([0, 0, 4]),
        start=draw.choice([None, None, 0, 5, key_len // 2]),
        seq_major=draw.random() < 0.5,
        seed=seed,
    )


def block_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and rising indices of a boolean block mask; entries past the count hold a number that must never be read."""
    counts = keep.sum(-1, dtype=torch.int32)
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int16)
    unused = torch.arange(keep.shape[-1], device=keep.device) >= counts[..., None]
    return counts, order.masked_fill_(unused, 32767)


def make_call(call: Call, device: str = "cuda") -> AttentionCall:
    """The op's call, its tensors drawn."""
    torch.manual_seed(call.seed)
    value_dim = call.value_dim or call.head_dim
    shapes = (
        (call.heads, call.query_len, call.head_dim),
        (call.kv_heads, call.key_len, call.head_dim),
        (call.kv_heads, call.key_len, value_dim),
    )
    query, key, value = (_laid_out(call, device, *shape).to(call.dtype) for shape in shapes)
    if call.layout == "expanded":
        key, value = (tensor[:1].expand(call.batch, -1, -1, -1) for tensor in (key, value))
    if call.inputs == "huge":
        query = query * 30
    if call.inputs == "equal":
        key = torch.ones_like(key)
    if call.inputs == "rising":  # along the walk, from the last keys to the first: every block outgrows the softmax's reference
        query, key = query.abs(), key.abs() * torch.linspace(30, 0.1, call.key_len, device=device)[:, None].to(call.dtype)
    if call.inputs == "low":
        query, key = query.abs() * -3, key.abs() * 3
    blocks = (call.batch, call.heads, -(-call.query_len // 128), -(-call.key_len // 128))
    counts, indices = block_lists(torch.rand(*blocks, device=device) < call.density) if call.density else (None, None)
    segments = torch.randint(0, call.segments, (call.batch, call.key_len), device=device).sort(-1).values.int() if call.segments else None
    return AttentionCall(
        query,
        key,
        value,
        key_flags=_flags(call).to(device) if call.padding else None,
        segments=segments,
        query_start=None if call.start is None else torch.tensor([call.start], device=device),
        block_counts=counts,
        block_indices=indices,
        sink_logits=torch.randn(call.heads, device=device) * 3 if call.sink_logits else None,
        scale=call.head_dim**-0.5,
        causal=call.causal,
        windows=call.windows,
        sinks=call.sinks,
        softcap=call.softcap,
        seq_major=call.seq_major,
    )


def _laid_out(call: Call, device: str, heads: int, length: int, dim: int) -> Tensor:
    if call.layout == "fused":  # a part of one projection's output, split by heads
        wide = torch.randn(call.batch, length, 2 * heads * dim, device=device).to(call.dtype)
        return wide[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    if call.layout == "bnhd":
        return torch.randn(call.batch, length, heads, dim, device=device).transpose(1, 2)
    return torch.randn(call.batch, heads, length, dim, device=device)


def _flags(call: Call) -> Tensor:
    flags = torch.ones(call.batch, call.key_len, dtype=torch.uint8)
    for row in range(call.batch):
        hidden = (call.key_len // 3) * (row + 1) // call.batch
        if call.padding == "left":
            flags[row, :hidden] = 0
        elif call.padding == "right":
            flags[row, call.key_len - hidden :] = 0
        elif call.padding == "holes":
            flags[row, torch.rand(call.key_len) < 0.3] = 0
        elif row == 0:
            flags[row] = 0
        real = flags[row].nonzero()[: call.sinks, 0]
        flags[row, real] |= 2
    return flags


def check(call: Call) -> dict[str, Any]:
    """Error against the reference in fp64, and whether a second run gives the same bits. Raises AssertionError with the reason."""
    one = make_call(call)
    reason = hopper.obstacle(one)
    if reason is not None:
        return {"served": False, "reason": reason}
    runs = []
    for _ in range(2):
        output, lse = hopper.launch(one, tuning=call.tuning, into=_poisoned(one))
        runs.append((output, lse))
    torch.cuda.synchronize()
    (output, lse), again = runs
    wide = torch.float32 if call.query_len * call.heads > 40000 else torch.float64
    expected, expected_lse = reference.attention(one.in_dtype(wide))
    problems = []
    same_output = torch.equal(output.view(torch.int16), again[0].view(torch.int16))
    if not (same_output and torch.equal(lse.view(torch.int32), again[1].view(torch.int32))):
        problems.append("two runs differ")
    if output.isnan().any() or lse.isnan().any():
        problems.append(f"NaN in {output.isnan().float().mean():.2%} of the output and {lse.isnan().float().mean():.2%} of the LSE")
    error = float((output.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    empty = expected_lse.isinf()
    if not torch.equal(empty, lse.isinf()):
        problems.append("other rows are empty")
    if output.transpose(-1, -2).masked_select(empty[:, :, None]).any():
        problems.append("an empty row has output")
    both = ~(empty | lse.isinf())
    difference = (lse.double() - expected_lse.double()).abs() / expected_lse.double().abs().clamp_min(1)
    lse_error = float(difference[both].max()) if both.any() else 0.0
    if not error < ERROR_LIMIT[call.dtype]:
        problems.append(f"error {error:.2e}")
    if not lse_error < LSE_LIMIT:
        problems.append(f"LSE error {lse_error:.2e}")
    return {"served": True, "ok": not problems, "problems": "; ".join(problems), "error": error, "lse_error": lse_error}


def _poisoned(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = call.empty_outputs()
    return output.fill_(torch.nan), lse.fill_(torch.nan)


def check_capture() -> dict[str, Any]:
    """A CUDA graph's replay, and launches on two streams at once, give what plain launches give."""
    one = make_call(Call(heads=8, query_len=2048, key_len=2048, density=0.3))
    expected, _ = hopper.launch(one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = hopper.launch(one)
    captured.fill_(torch.nan)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(captured.clone())
    streams, outputs = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(hopper.launch(one)[0])
    torch.cuda.synchronize()
    same = [torch.equal(expected, other) for other in (*replays, *outputs)]
    return {"served": True, "ok": all(same), "problems": "" if all(same) else f"equal: {same}"}
