"""Costs: formulas agree with what is counted by hand, grow with their arguments, and are printed as what they come to."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cost_model import whole_model
from sparsify.costs import crossovers, profile, seconds, work
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes
from sparsify.ops.estimate import EXACT, EXAMPLES, Estimate
from sparsify.ops.pages import Pages

H200 = Device.from_profile("cuda", profile.shipped("sm_90"))
A100 = Device.from_profile("cuda", profile.for_capability((8, 0)))
LLAMA_8B = whole_model.ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
LENGTHS = st.sampled_from([1 << i for i in range(7, 19)])
KERNELS = st.sampled_from(["sdpa", "hopper", "triton"])
QUICK = settings(max_examples=40, deadline=None)


def prompt(length: int, batch: int = 1, **more) -> AttentionSizes:
    return AttentionSizes(batch=batch, query_len=length, key_len=length, **more)


def attention(sizes: AttentionSizes, device: Device = H200, **more) -> float:
    return float(seconds.attention_seconds(sizes, device, **more))


def brute_force_blocks(query_len: int, key_len: int) -> int:
    """Blocks of 128 × 128 in which some row sees a key, causal with the last row on the last key."""
    start = key_len - query_len
    return sum(-(-(start + min(row + 128, query_len)) // 128) for row in range(0, query_len, 128))


@pytest.mark.parametrize("query_len, key_len", [(128, 128), (1024, 1024), (4096, 4096), (512, 4096), (128, 8192)])
def test_dense_flops_are_those_of_the_blocks_that_causality_leaves(query_len, key_len):
    counted = work.attention(AttentionSizes(query_len=query_len, key_len=key_len), "hopper").flops
    assert counted == 32 * brute_force_blocks(query_len, key_len) * 4 * 128 * 128 * 128


def test_a_listed_call_computes_its_share_of_them():
    dense, tenth = (work.attention(prompt(8192), "hopper", share=share, listed=True) for share in (1, sympy.Rational(1, 10)))
    assert dense.flops == 10 * tenth.flops
    assert tenth.size == dense.size, "queries and outputs move whatever is skipped"


@pytest.mark.parametrize("estimate", EXAMPLES, ids=str)
def test_estimate_flops_match_the_paper(estimate):
    """arXiv 2503.16428: antidiagonal scores cost 1/stride of the products that QKᵀ costs; the diagonal's tiles are on top."""
    length, stride = 131072, 16
    exact = 2 * 32 * 128 * length**2 / 2 / stride
    found = work.selection(prompt(length), stride, estimate=estimate)
    assert (found.flops8 != 0) == estimate.int8 and (found.flops == 0) == estimate.int8
    assert float(found.flops + found.flops8 / 2) == pytest.approx(exact * float(estimate.share(4)), rel=0.04)


def test_eight_bits_are_counted_apart():
    one = work.selection(prompt(8192), 8, estimate=Estimate(int8=True))
    assert one.flops == 0
    # at the diagonal its narrower tile computes 64 columns less that nobody asked for, of 1024 rows of 32 heads
    assert one.flops8 == work.selection(prompt(8192), 8).flops - 2 * 32 * 1024 * 64 * 8 * 128
    assert one.prepare > 0


@QUICK
@given(LENGTHS, LENGTHS, KERNELS, st.sampled_from([1, 2, 8]))
def test_longer_prompts_and_larger_batches_take_longer(first, second, kernel, batch):
    short, long = sorted((first, second))
    assert attention(prompt(short, batch), kernel=kernel) <= attention(prompt(long, batch), kernel=kernel)
    assert attention(prompt(long, batch), kernel=kernel) <= attention(prompt(long, batch + 1), kernel=kernel)


@QUICK
@given(LENGTHS, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(["hopper", "triton"]))
def test_more_blocks_take_longer(length, first, second, kernel):
    few, many = sorted((first, second))
    listed = lambda share: attention(prompt(length), kernel=kernel, share=share, listed=True)
    assert listed(few) <= listed(many) * (1 + 1e-9)
    assert listed(many) <= listed(1) * (1 + 1e-9)


@QUICK
@given(LENGTHS, st.integers(64, 1 << 17), st.integers(64, 1 << 17))
def test_wider_windows_take_longer_(length, first, second):
    narrow, wide = sorted((first, second))
    assert attention(prompt(length), kernel="hopper", window=narrow) <= attention(prompt(length), kernel="hopper", window=wide) * (1 + 1e-9)


@QUICK
@given(
    st.sampled_from([1 << i for i in range(14, 19)]),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([EXACT, Estimate(half=True), Estimate(group=True)]),
)
def test_a_coarser_estimate_is_cheaper(length, stride, estimate):
    """Of long prompts: one tile is deeper the coarser it is, and short prompts are one tile a head."""
    cost = lambda s, e: float(seconds.estimate_seconds(prompt(length), H200, s, estimate=e))
    if stride < 16:
        assert cost(2 * stride, estimate) <= cost(stride, estimate) * (1 + 1e-9)
    if not estimate.half:
        assert cost(stride, replace(estimate, half=True)) <= cost(stride, estimate) * (1 + 1e-9)


@QUICK
@given(st.integers(1, 1 << 19), st.integers(1, 1 << 19), st.sampled_from(["sdpa", "cache", "hopper"]))
def test_reading_fewer_keys_is_cheaper(first, second, kernel):
    few, many = sorted((first, second))
    read = lambda kept: float(seconds.decode_seconds(AttentionSizes(key_len=1 << 19), H200, kernel=kernel, kept=kept))
    assert read(few) <= read(many)


def test_decode_is_the_stream_of_keys_and_values():
    step = work.attention(AttentionSizes(query_len=1, key_len=131072), "sdpa")
    assert (step.family, step.size) == ("sdpa/decode", 2 * 8 * 131072 * 128 * 2)
    assert work.attention(AttentionSizes(query_len=1, key_len=131072), "hopper").family == "split/decode"
    windowed = dataclasses.replace(AttentionSizes(query_len=1, key_len=131072), window=1024)
    assert work.attention(windowed, "sdpa").size == 2 * 8 * 1024 * 128 * 2


def test_a_step_over_codes_reads_them_and_their_scales():
    sizes = AttentionSizes(query_len=1, key_len=131072)
    whole = work.decode(sizes, "cache").size
    assert float(work.code_reading(sizes, "fp8").size / whole) == pytest.approx(262 / 512, rel=2e-3)
    assert float(work.code_reading(sizes, "int4").size / whole) == pytest.approx(140 / 512, rel=2e-3)


def test_a_step_over_pages_reads_all_bounds_and_what_is_chosen():
    sizes = AttentionSizes(query_len=1, key_len=131072)
    whole = work.decode(sizes, "cache").size
    bounds, chosen = work.page_reading(sizes, Pages(size=16, share=0.05, sinks=4, recent=60))
    assert bounds.size == whole / 16
    assert chosen.size == pytest.approx(float(whole * (0.05 + 64 / 131072)))
    _, counted = work.page_reading(sizes, Pages(size=16, count=100, sinks=4, recent=60))
    assert counted.size == whole * (1600 + 64) / 131072
    _, everything = work.page_reading(AttentionSizes(query_len=1, key_len=1024), Pages(share=1.0))
    assert everything.size == work.decode(AttentionSizes(query_len=1, key_len=1024), "cache").size


def test_symbols_go_through_and_give_the_same_number():
    n = sympy.Symbol("n", integer=True, positive=True)
    formula = seconds.attention_seconds(prompt(n), H200, kernel="hopper")
    assert formula.free_symbols == {n}
    assert seconds.value_at(formula, {n: 32768}) == pytest.approx(attention(prompt(32768), kernel="hopper"), rel=1e-12)
    assert seconds.value_at(formula, {}) is None


def test_a_family_nobody_measured_costs_what_its_kernel_does_elsewhere():
    assert not A100.knows("hopper/lists")
    assert A100.coefficients("hopper/lists") == A100.coefficients("triton/causal")
    assert H200.coefficients("hopper/unheard") == H200.coefficients("hopper/causal")


def test_products_of_fp32_are_slower_on_a_gpu():
    wide = prompt(8192, dtype=torch.float32)
    assert attention(wide, kernel="triton") > 4 * attention(prompt(8192), kernel="triton")


def test_the_formula_says_what_the_maximum_comes_to():
    text = seconds.formula(lambda sizes: (work.attention(sizes, "hopper"),), prompt(65536), H200)
    assert text.startswith("hopper/causal ")
    assert "B·H·N²" in text
    assert "Max" not in text
    decode = seconds.formula(lambda sizes: (work.decode(sizes, "cache"),), AttentionSizes(query_len=1, key_len=4096), H200)
    assert "B·G·N" in decode


def test_the_formula_evaluates_to_the_seconds_beside_it():
    text = seconds.formula(lambda sizes: (work.attention(sizes, "sdpa"),), prompt(65536), H200)
    body = text.split(": ", 1)[1].replace("²", "**2").replace("·", "*").replace("^", "**")
    value = sympy.sympify(body, locals={name: sympy.Symbol(name) for name in "BHGN"}).subs({"B": 1, "H": 32, "G": 8, "N": 65536})
    assert float(value) == pytest.approx(attention(prompt(65536), kernel="sdpa"), rel=0.05)


# -- crossovers ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, kernel", [(H200, "hopper"), (A100, "triton")])
def test_a_solved_length_is_where_the_sign_changes(device, kernel):
    start = crossovers.sparse_from(device, 8, 128, 128, None, kernel)
    assert start % 1024 == 0

    def gain(n: int) -> float:
        share = seconds.expected_density(sympy.Integer(n))
        sparse = seconds.estimate_seconds(prompt(n), device, 8) + seconds.attention_seconds(
            prompt(n), device, kernel=kernel, share=share, listed=True
        )
        dense = min(attention(prompt(n), device, kernel=name) for name in ("sdpa", kernel))
        return crossovers.MAX_COST_RATIO * dense - float(sparse)

    assert gain(start) > 0 >= gain(start - 1024)
    assert all(gain(start * factor) > 0 for factor in (2, 4, 8))


def test_the_cost_ratio_says_how_much_a_lossy_method_has_to_buy():
    starts = [crossovers.sparse_from(H200, 8, 128, 128, None, "hopper", max_cost_ratio=ratio) for ratio in (0.25, 0.5, 1.0)]
    assert starts == sorted(starts, reverse=True)
    assert starts[0] > starts[-1]


def test_polynomials_are_solved_and_others_bisected():
    n = crossovers.LENGTH
    assert crossovers.solve_from(n**2 - 5000 * n) == 5120
    assert crossovers.solve_from(sympy.Max(n - 5000, 0) - 1) == 5120
    assert crossovers.solve_from(-n) == crossovers.solve_from(sympy.Min(-n, 0)) == crossovers.LONGEST
    assert crossovers.solve_from(n + 1) == crossovers.solve_from(sympy.Max(n, 1)) == 1024


def test_a_kernel_that_never_wins_gets_no_regime():
    assert crossovers.kernel_from(H200, "triton", 128) == crossovers.LONGEST
    assert 1024 <= crossovers.kernel_from(H200, "hopper", 128) <= 16384


# -- whole models --------------------------------------------------------------------------------------------------------------------------


def test_prefill_holds_the_products_and_nothing_much_beside_them():
    flops = 2 * 32768 * (LLAMA_8B.weight_bytes / 2 - 2 * LLAMA_8B.vocab * LLAMA_8B.hidden)
    attend = 32 * attention(prompt(32768), kernel="sdpa")
    compiled, eager = (float(whole_model.prefill_seconds(LLAMA_8B, H200, 32768, compiled=one)) for one in (True, False))
    assert flops / H200.flops + attend < compiled < 1.25 * (flops / H200.flops + attend)
    assert compiled < eager


def test_layers_may_differ():
    fast, slow = 1e-3, 5e-3
    mixed = whole_model.prefill_seconds(LLAMA_8B, H200, 8192, attention=[fast] * 16 + [slow] * 16)
    same = whole_model.prefill_seconds(LLAMA_8B, H200, 8192, attention=(fast + slow) / 2)
    assert float(mixed) == pytest.approx(float(same))


def test_decode_streams_weights_and_cache_once():
    step = lambda n, **more: float(whole_model.decode_seconds(LLAMA_8B, H200, n, **more))
    weights = LLAMA_8B.weight_bytes - 2 * LLAMA_8B.vocab * LLAMA_8B.hidden
    assert step(1) > weights / 4.8e12, "no H200 reads faster"
    assert step(131072) - step(1) == pytest.approx(float(LLAMA_8B.cache_bytes(131072)) / 4.3e12, rel=0.25)
    assert step(131072, batch=8) > 4 * (step(131072) - step(1))
    kept = seconds.decode_seconds(LLAMA_8B.attention(1, 131072), H200, kept=4096)
    assert step(131072, attention=kept) < step(131072)
    assert step(1024, ffn_share=0.5) < step(1024, ffn_share=1, skipping=True)


def test_shapes_come_from_configurations():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    )
    assert whole_model.ModelShape.from_config(config) == LLAMA_8B
    assert LLAMA_8B.weight_bytes == pytest.approx(8030261248 * 2, rel=1e-3)


def test_a_linear_layer_is_a_product_or_a_stream():
    one, many = (float(seconds.linear_seconds(H200, rows, 4096, 14336)) for rows in (1, 8192))
    assert one >= 0.9 * 4096 * 14336 * 2 / 4.8e12
    assert many >= 2 * 8192 * 4096 * 14336 / 989e12, "no H200 multiplies faster"


def test_a_chunk_of_few_rows_pays_from_more_keys_on():
    prefill, chunk, few = (crossovers.sparse_from(H200, 8, 128, 128, 0.1, "hopper", query_len=rows) for rows in (None, 4096, 128))
    assert prefill <= chunk <= few
    assert prefill < few


def test_rows_that_see_every_key_count():
    none, some, many = (crossovers.sparse_from(H200, 8, 128, 128, 0.1, "hopper", last_rows=rows) for rows in (0, 128, 4096))
    assert none <= some <= many and none < many


@pytest.mark.parametrize("query_len, key_len", [(1024, 1024), (1000, 1000), (128, 4096), (300, 1000)])
@pytest.mark.parametrize("window", [1, 64, 128, 500, 4096])
def test_a_band_has_the_pairs_that_rows_see(query_len, key_len, window):
    seen = sum(min(key_len - query_len + row + 1, window) for row in range(query_len))
    counted = float(work.pairs(AttentionSizes(query_len=query_len, key_len=key_len), window))
    assert counted == pytest.approx(seen, abs=query_len)  # half a pair a row


def test_one_tile_takes_as_long_on_one_processor_as_it_must():
    """A chunk of 128 rows of one head runs on one processor, however many there are."""
    one = AttentionSizes(query_heads=1, kv_heads=1, query_len=128, key_len=65536)
    alone = 4 * 128 * 128 * 65536 / (H200.flops / H200.processors)
    assert attention(one, kernel="hopper") > 0.5 * alone
    spread = dataclasses.replace(one, query_heads=128, kv_heads=128)
    assert attention(spread, kernel="hopper") < 4 * attention(one, kernel="hopper")


def test_a_decode_step_without_splitting_waits_for_one_head():
    step = AttentionSizes(query_len=1, key_len=131072)
    assert work.decode(step, "triton").stream == 131072 * 256 * 2
    assert work.decode(step, "sdpa").stream == work.decode(step, "cache").stream == 0


def test_the_estimate_is_computed_in_whole_waves():
    features = lambda n: float(work.selection(prompt(n), 16).features(H200)["work"])
    assert features(2048) == features(4096), "32 or 64 tiles are one wave of 132"
    assert features(8192) == pytest.approx(2 * features(4096))


def test_a_step_that_nobody_waits_for_is_shorter():
    waited, alone = (float(whole_model.decode_seconds(LLAMA_8B, H200, 4096, waited=one)) for one in (True, False))
    assert waited > alone


def test_the_row_rule_costs_its_comparisons_and_a_second_stage_its_share():
    sizes = prompt(32768)
    of_row, of_max = (seconds.seconds(work.selection(sizes, 8, pool=pool), H200) for pool in ("row", "max"))
    assert 0.5e-4 < float(of_row - of_max) < 3e-4  # 0.05 ms at 32K, as 0.8 ms at 128K were measured, and some more
    tenth = work.selection(sizes, 4, pool="row", share=0.1)
    whole = work.selection(sizes, 4, pool="row")
    assert float(tenth.flops) == pytest.approx(0.1 * float(whole.flops)) and float(tenth.masses) == pytest.approx(0.1 * float(whole.masses))


def test_stages_are_counted_as_the_op_serves_them():
    """Cells are made once, listed blocks alone are scored again, rows too long for two stages have one, by the kernels that serve it."""
    quad = Estimate.parse("quad+int8+peak")
    stages = lambda n, **more: work.selections(prompt(n), 8, 128, quad, "row", 4, 0.1, **more)
    first, second = stages(65536)
    assert first == work.selection(prompt(65536), 8, estimate=quad, pool="row") and first.family == second.family == "select/streamed"
    assert first.prepare > 0 and first.passes > 0 and second.prepare == second.passes == 0
    whole = work.selection(prompt(65536), 4, estimate=quad, pool="row")
    assert float(second.flops8) == pytest.approx(0.3 * float(whole.flops8))
    listed = stages(65536, listed=0.7)
    assert listed[0] == first and float(listed[1].flops8) == pytest.approx(0.7 * float(whole.flops8))
    half = work.selections(prompt(65536), 8, 128, dataclasses.replace(quad, half=True), "row", 4, 0.1)
    assert half[1].prepare > 0, "cells of every second query cell are others"
    assert len(stages(1 << 20)) == 2
    (alone,) = stages((1 << 20) + 1)
    assert alone == work.selection(prompt((1 << 20) + 1), 4, estimate=quad, pool="row") and alone.family == "select"
    families = {
        label: work.selection(prompt(8192), 8, estimate=Estimate.parse(label), pool="row").family for label in ("quad+int8", "int8", "quad")
    }
    assert families == {"quad+int8": "select/streamed", "int8": "select", "quad": "select"}
    assert work.selection(prompt(8192), 8, estimate=quad).family == "select", "the maximum has other kernels"


def test_streamed_selections_cost_what_others_do_where_a_profile_knows_no_better():
    shipped = profile.shipped("sm_90")
    families = {name: found for name, found in shipped.families.items() if name != "select/streamed"}
    device = Device.from_profile("cuda", shipped.model_copy(update={"families": families}))
    assert device.coefficients("select/streamed") == shipped.families["select"]


@pytest.mark.parametrize("refine_stride", [0, 4])
@pytest.mark.parametrize("pool", ["max", "row"])
def test_no_selection_is_expected_to_multiply_for_nothing(pool, refine_stride):
    """Of whatever estimate and in how many stages, also where nobody measured them: products take the device's time for them at least."""
    for estimate in EXAMPLES if pool == "max" and not refine_stride else [one for one in EXAMPLES if not one.group]:
        works = work.selections(prompt(131072), 8, 128, estimate, pool, refine_stride, 0.04)
        floor = sum(one.flops / H200.matrix_flops(torch.bfloat16) + one.flops8 / (2 * H200.matrix_flops(torch.bfloat16)) for one in works)
        assert float(seconds.seconds(works, H200)) >= 0.9 * float(floor), estimate
