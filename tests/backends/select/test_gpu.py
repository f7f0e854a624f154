"""Generated block selection on a real GPU, at the tile sizes that calls get. `python -m tests.backends.select.test_gpu` prints times."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from sparsify.backends.select import reference
from sparsify.backends.select.source import POINTER_TILING
from sparsify.ops import block_lists
from sparsify.ops.estimate import EXAMPLES, parse_label
from sparsify.ops.selection import SelectCall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MASKS = {
    "plain": {},
    "ragged": {},
    "padded": {},
    "window": {"windows": [700]},
    "row": {"pool": "row", "threshold": [0.4]},
    "least share": {"pool": "row", "threshold": [0.4], "min_share": 0.05},
    **{str(one): {"estimate": one} for one in EXAMPLES},
}


def call(query, key, **changes):
    found = SelectCall.bind(query, key, **{"scale": 128**-0.5, "causal": True, "stride": 16, "threshold": [0.9], **changes})
    found.check()
    return found


def inputs(length, *, batch=1, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16, peak=12.0):
    torch.manual_seed(0)
    query = peak * torch.randn(batch, heads, length, dim, device="cuda")
    return query.to(dtype), torch.randn(batch, kv_heads, length, dim, device="cuda").to(dtype)


@pytest.mark.parametrize("tiling", [None, POINTER_TILING], ids=["device", "pointers"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("stride, dim", [(8, 128), (16, 128), (16, 64), (4, 96)])
def test_equals_the_reference(name, stride, dim, tiling):
    from sparsify.backends.select import triton as triton_select

    length = 4999 if name == "ragged" else 6144
    query, key = inputs(length, batch=2, dim=dim)
    options = {"stride": stride, "scale": dim**-0.5, **MASKS[name]}
    if name == "padded":
        flags = torch.ones(2, length, dtype=torch.uint8, device="cuda")
        flags[0, :777], flags[1, length - 1000 :] = 0, 0
        options["key_flags"] = flags
    one = call(query, key, **options)
    own, wanted = triton_select.importance(one, tiling=tiling), reference.importance(one)
    assert (own - wanted).norm() / wanted.norm() < (2e-2 if one.estimate.group else 2e-3)
    counts, indices = triton_select.select_blocks(one, tiling=tiling)
    block_lists.check(counts, indices, length, length, 0, 128)
    got = block_lists.to_dense(counts, indices, one.key_blocks)
    possible, forced = reference.candidates(one)
    chosen = reference.choose(own, possible, forced, one)
    assert (got ^ chosen).sum() <= 1e-4 * chosen.sum()
    again = triton_select.select_blocks(one, tiling=tiling)
    assert torch.equal(block_lists.to_dense(*again, one.key_blocks), got)


@pytest.mark.parametrize("label", ["row/4@0.6", "row+pair+int8/4@0.7", "row/8@0.6"])
@pytest.mark.parametrize("length", [4096, 4999])
def test_a_second_stage_chooses_among_what_is_listed(length, label):
    from sparsify.backends.select import stages
    from sparsify.backends.select import triton as triton_select

    query, key = inputs(length, batch=2)
    one = call(query, key, **parse_label(label), threshold=[0.3])
    coarse, fine = one.stages
    counts, indices = one.empty_lists()
    listed = block_lists.to_dense(*stages.two_stages(one, (counts, indices), None, triton_select.LIMITS), one.key_blocks)
    least = reference.group_lists(coarse)
    assert (least & ~listed).sum() <= 2e-3 * least.sum() and listed.sum() < 1.3 * least.sum()
    block_lists.check(counts, indices, length, length, 0, 128)
    got = block_lists.to_dense(counts, indices, one.key_blocks)
    among = reference.for_heads(listed, one)
    mass = reference.importance(fine) * among[:, :, :, None]
    _, forced = reference.candidates(fine)
    shares = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)  # behind the last token a block has cells without mass
    wanted = reference.choose(shares, among, forced & among, fine)
    assert (got ^ wanted).sum() <= 5e-3 * wanted.sum()
    assert wanted.sum() < among.sum()
    assert all(map(torch.equal, stages.select_blocks(one)[:1], (counts,)))


@pytest.mark.parametrize("two", [False, True], ids=["one stage", "two stages"])
@pytest.mark.parametrize(
    "dim, changes",
    [
        (64, {}),
        (80, {}),
        (96, {}),
        (128, {}),
        (256, {}),
        (128, {"scale": -(128**-0.5)}),
        (128, {"start": 2040}),
        (80, {"scale": -0.1, "start": 2040}),
    ],
)
def test_the_default_estimate_gives_the_reference_s_masses(dim, changes, two):
    """Long rows, most tiles of which nothing is masked in; GPUs differ from the interpreter in how tiles lie in registers."""
    from sparsify.backends.select import stages, streamed
    from sparsify.backends.select import triton as triton_select

    query, key = inputs(4780, dim=dim, peak=2.0)
    options = {"scale": dim**-0.5, "stride": 8, "pool": "row", "estimate": "quad+int8+peak", "threshold": [0.8], "block_size": 128}
    if "start" in changes:
        options["query_start"] = torch.tensor([changes["start"]], device="cuda")
    options |= {name: value for name, value in changes.items() if name != "start"}
    one = call(query, key[:, :, :4645], **options, **({"refine_stride": 4, "coarse_threshold": 0.95} if two else {}))
    fine = one.stages[1] if two else one
    lists = one.empty_lists()
    own = torch.zeros(1, 8, one.query_blocks, 128 // fine.span, one.key_blocks, device="cuda")
    possible, forced = reference.candidates(fine)
    if two:
        listed = stages.two_stages(one, lists, own, triton_select.LIMITS)
        possible = possible & reference.for_heads(block_lists.to_dense(*listed, one.key_blocks), one)
    else:
        stages.one_stage(one, streamed.spec_of(one, triton_select.LIMITS), lists, own, triton_select.LIMITS)
    wanted = reference.importance(fine) * possible[:, :, :, None]
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-30)
    assert (own - wanted).abs().max() < 2e-2
    got = block_lists.to_dense(*lists, one.key_blocks)
    chosen = reference.choose(own, possible.expand_as(got), (forced & possible).expand_as(got), fine)
    assert (got ^ chosen).sum() <= 2e-3 * chosen.sum() and chosen.sum() < possible.expand_as(got).sum()


def test_a_captured_call_replays_on_new_values():
    from sparsify.backends.select import triton as triton_select

    query, key = inputs(4096)
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    one = call(query, key, query_start=start, threshold=[0.5 + 0.05 * h for h in range(8)])
    triton_select.select_blocks(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, indices = triton_select.select_blocks(one)
    other, _ = inputs(4096, peak=3.0)
    query.copy_(other)
    graph.replay()
    wanted = triton_select.select_blocks(one)
    assert torch.equal(counts, wanted[0])
    assert torch.equal(block_lists.to_dense(counts, indices, 32), block_lists.to_dense(*wanted, 32))


def times() -> None:
    """One JSON object a line: milliseconds of the whole op for Llama-3.1-8B's shape, 32 query heads over 8."""
    import triton

    from sparsify.backends.select import triton as triton_select

    for length in (8192, 32768, 131072, 131072 - 5, 262144):
        query, key = inputs(length, heads=32, kv_heads=8, peak=1.0)
        for stride, name in (
            (16, "sum"),
            (16, "max"),
            (8, "max"),
            (8, "max+half"),
            (16, "max+group"),
            (16, "max+int8"),
            (16, "max+pair+int8"),
            (8, "max+pair+int8"),
            (8, "max+quad+int8"),
            (16, "max+half+int8"),
        ):
            once = functools.partial(triton_select.select_blocks, call(query, key, stride=stride, **parse_label(name)))
            ms = triton.testing.do_bench(once, warmup=50, rep=300, return_mode="median")
            print(json.dumps({"tokens": length, "stride": stride, "pool": name, "ms": round(ms, 3)}), flush=True)


if __name__ == "__main__":
    times()
