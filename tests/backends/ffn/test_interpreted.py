"""The generated feed-forward kernels in Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.ffn import few_rows as triton_ffn
from sparsify.backends.ffn import in_parts, many_rows, reference
from sparsify.backends.ffn import source as ffn_source
from sparsify.backends.ffn.source import FfnTiling, RowsTiling
from sparsify.errors import UnsupportedError
from sparsify.ops import feed_forward

pytestmark = pytest.mark.interpreter

BASE = {
    "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": 1e-5, "post_norm": "none", "post_eps": 0.0,
    "scale": 1.0, "threshold": 0.9, "skip_next": 2, "version": feed_forward.VERSION,
}  # fmt: skip
CASES = {
    "llama": {},
    "gemma": {"activation": "gelu_tanh", "norm": "rms_offset", "post_norm": "rms_offset", "post_eps": 1e-6},
    "phi3": {"layout": "gate_up"},
    "up_first": {"layout": "up_gate", "norm": "rms_fp32", "bias": True},
    "olmo2": {"norm": "none", "post_norm": "rms_fp32", "post_eps": 1e-5},
    "opt": {"layout": "plain", "activation": "relu", "norm": "layer", "bias": True},
    "neox": {"layout": "plain", "activation": "gelu", "norm": "layer", "bias": True, "post_norm": "layer", "post_eps": 1e-5},
    "gpt2": {"layout": "plain", "activation": "gelu_tanh", "norm": "layer", "bias": True, "transposed": True},
    "granite": {"scale": 0.22, "post_norm": "rms", "post_eps": 1e-5},
}
HIDDEN, INTERMEDIATE = 64, 160
TILING = FfnTiling(up_tile=64, up_step=64, down_tile=64, down_step=32, parts=2, warps=4, up_stages=2, down_stages=2)


def operands(case: str, rows: int, dtype: torch.dtype, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE):
    call = {**BASE, **CASES[case]}
    bias = call.pop("bias", False)
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator) * scale).to(dtype)
    turned = (lambda w: w.t().contiguous()) if call["transposed"] else (lambda w: w)
    fused = call["layout"] in ("gate_up", "up_gate")
    up = turned(draw(intermediate * (2 if fused else 1), hidden, scale=hidden**-0.5))
    down = turned(draw(hidden, intermediate, scale=0.7 * intermediate**-0.5))
    if call["layout"] == "split":
        call["gate"] = draw(intermediate, hidden, scale=hidden**-0.5)
    if bias:
        call["up_bias"] = draw(intermediate * (2 if fused else 1))
        call["down_bias"] = draw(hidden)
    if call["norm"] != "none":
        call["norm_weight"] = draw(hidden) + 1
        if call["norm"] == "layer":
            call["norm_bias"] = draw(hidden)
    if call["post_norm"] != "none":
        call["post_weight"] = draw(hidden)
        if call["post_norm"] == "layer":
            call["post_bias"] = draw(hidden)
    x = draw(rows, 1, hidden)
    return (x, draw(rows, 1, hidden), up, down), call


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("bf16", "fp16", "fp32"):
        monkeypatch.setitem(triton_ffn.tilings, (name, HIDDEN, INTERMEDIATE), TILING)


def compare(case: str, rows: int, dtype: torch.dtype, counters: list[int] | None = None, **changes):
    (residual, source, up, down), call = operands(case, rows, dtype)
    call.update(changes)
    remaining = torch.tensor(counters if counters is not None else [(i % 4) - 1 for i in range(rows)], dtype=torch.int32)
    want, after = reference.ffn(residual, source, remaining, up, down, **call)
    got, got_after = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * want.abs().max()
    assert (got.float() - want.float()).abs().max() <= bound
    assert torch.equal(got_after, after)
    skipped = remaining > 0
    assert torch.equal(got[skipped], residual[skipped])
    return got


@pytest.mark.parametrize("case", CASES)
@pytest.mark.samples(3)
def test_families_in_fp32(case):
    compare(case, 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "opt", "gemma"])
def test_half_precision(case, dtype):
    compare(case, 3, dtype, threshold=-1.0)


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
def test_rows(rows):
    compare("llama", rows, torch.float32, [0] * rows)


def test_sizes_that_no_tile_divides():
    args, call = operands("llama", 2, torch.float32, hidden=72, intermediate=200)
    remaining = torch.tensor([0, -1], dtype=torch.int32)
    residual, source, up, down = args
    want, after = reference.ffn(residual, source, remaining, up, down, **call)
    got, got_after = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert torch.equal(after, got_after)


def test_no_weight_is_read_when_all_rows_skip():
    """NaN weights would show; one computing row reads them, and only that row feels it."""
    (residual, source, up, down), call = operands("llama", 3, torch.float32)
    up, down = torch.full_like(up, float("nan")), torch.full_like(down, float("nan"))
    got, after = triton_ffn.ffn(residual, source, torch.tensor([1, 2, 3], dtype=torch.int32), up, down, **call)
    assert torch.equal(got, residual) and after.tolist() == [0, 1, 2]
    got, after = triton_ffn.ffn(residual, source, torch.tensor([1, 0, 3], dtype=torch.int32), up, down, **call)
    assert torch.equal(got[[0, 2]], residual[[0, 2]]) and got[1].isnan().all()
    assert after.tolist() == [0, 0, 2]


def test_a_threshold_above_one_is_dense_bit_for_bit():
    (residual, source, up, down), call = operands("llama", 3, torch.bfloat16)
    never, after = triton_ffn.ffn(residual, source, torch.zeros(3, dtype=torch.int32), up, down, **{**call, "threshold": 1.5})
    dense, _ = triton_ffn.ffn(residual, source, torch.full((3,), -1, dtype=torch.int32), up, down, **call)
    assert torch.equal(never, dense) and after.tolist() == [0, 0, 0]


def test_rows_do_not_influence_each_other():
    (residual, source, up, down), call = operands("llama", 4, torch.float32)
    remaining = torch.zeros(4, dtype=torch.int32)
    want, _ = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    source, remaining = source.clone(), remaining.clone()
    source[1], remaining[2] = float("nan"), 1
    got, after = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    assert got[1].isnan().all() and after[1] == 0


# -- many rows: those that compute are compacted -----------------------------------------------------------------------------------------

ROWS_TILING = RowsTiling(row_tile=16, up_tile=64, down_tile=64, step=32, up_stages=2, down_stages=2, warps=4)


@pytest.fixture
def many(monkeypatch):
    """Small tiles, three programs, and chunks of 32 rows, so that everything is ragged and walked more than once."""
    for name in ("bf16", "fp16", "fp32"):
        monkeypatch.setitem(many_rows.tilings, name, ROWS_TILING)
    for module in (ffn_source, many_rows):
        monkeypatch.setattr(module, "CHUNK", 32)
    many_rows.kernels.cache_clear()
    yield
    many_rows.kernels.cache_clear()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.samples(2)
def test_many_rows(many, case):
    compare(case, 37, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_in_half_precision(many, dtype):
    compare("gpt2" if dtype == torch.float16 else "gemma", 40, dtype, threshold=-1.0)


@pytest.mark.parametrize(
    "counters", [[0] * 70, [3] * 70, [2] * 69 + [0], [0] + [1] * 69, [i % 2 for i in range(70)], [-1, 0, 5, 0, 1] * 14]
)
def test_any_rows_may_skip(many, counters):
    compare("phi3", 70, torch.float32, counters)


def test_many_skipping_rows_read_no_weight_and_no_neighbour(many):
    (residual, source, up, down), call = operands("llama", 40, torch.float32)
    remaining = torch.tensor([0, 1] * 20, dtype=torch.int32)
    want, after = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    source = source.clone()
    source[1::2], source[4] = float("nan"), float("nan")
    got, got_after = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    kept = torch.arange(40) != 4
    assert torch.equal(got[kept], want[kept]) and torch.equal(got_after[kept], after[kept])
    assert got[4].isnan().all() and got_after[4] == 0
    nothing = torch.full_like(up, float("nan")), torch.full_like(down, float("nan"))
    got, after = triton_ffn.ffn(residual, residual, remaining + 1, *nothing, **call)
    assert torch.equal(got, residual) and torch.equal(after, remaining)


def test_a_row_gives_the_same_wherever_it_is_compacted_to(many):
    """Bit for bit: the sums of a row do not depend on which rows are computed beside it."""
    (residual, source, up, down), call = operands("llama", 40, torch.bfloat16)
    dense, _ = triton_ffn.ffn(residual, source, torch.full((40,), -1, dtype=torch.int32), up, down, **call)
    remaining = torch.tensor([1, 0, 1, 1, 0] * 8, dtype=torch.int32)
    got, _ = triton_ffn.ffn(residual, source, remaining, up, down, **call)
    assert torch.equal(got[remaining == 0], dense[remaining == 0])


def test_rows_that_descriptors_cannot_read_are_refused(many):
    (residual, source, up, down), call = operands("llama", 33, torch.float32, hidden=66)
    with pytest.raises(UnsupportedError, match="16 bytes"):
        triton_ffn.ffn(residual, source, torch.zeros(33, dtype=torch.int32), up, down, **call)


@pytest.mark.parametrize(
    "start", [{"warmup": 2, "most": 0, "length": 0}, {"warmup": 1, "most": 3, "length": 5}, {"warmup": 0, "most": 4, "length": 0}]
)
def test_counters_from_positions(start):
    like = torch.zeros(3, 1, 8)
    sequences = [4, 5, 6, 7, 8, 9, 3, 4, 9, 10, 11]
    for kind in ("positions", "slot"):
        results = []
        for module in (reference, triton_ffn):
            feed_forward.forget_runs()
            made = []
            for p in sequences:
                positions = torch.tensor([[p - 2], [p], [p - 1]]) if kind == "positions" else None
                slot = -1 if kind == "positions" else p
                made.append(module.ffn_start(like, positions, slot, **start, key=7, version=1).tolist())
            results.append(made)
        assert results[0] == results[1]
    assert triton_ffn.ffn_start(like, None, -1, warmup=0, most=2, length=0, key=7, version=1).tolist() == [2, 2, 2]


PARTS = {name: case for name, case in CASES.items() if name in ("llama", "gemma", "phi3", "up_first", "opt", "neox", "gpt2")}


def compare_parts(case: str, rows: int, dtype: torch.dtype, part_rows: int, intermediate: int = INTERMEDIATE):
    (_, source, up, down), call = operands(case, rows, dtype, intermediate=intermediate)
    known = ("gate", "up_bias", "gate_bias", "down_bias")
    call = {name: call.get(name) for name in (*known, "layout", "transposed", "activation", "version")}
    want = in_parts.plain(source, up, down, part_rows=part_rows, **call)
    got = in_parts.with_kernel(source, up, down, part_rows=part_rows, **call)
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * want.abs().max()
    assert (got.float() - want.float()).abs().max() <= bound


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_families(case):
    compare_parts(case, 7, torch.float32, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_in_half_precision(dtype):
    compare_parts("llama", 5, dtype, 4)


def test_parts_whose_rows_take_several_programs():
    compare_parts("up_first", 3, torch.float32, 2, intermediate=2500)
