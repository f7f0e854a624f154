"""How results must change when inputs change, whatever the right result is: whole models, and attention alone."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.support.harness import compiled, strict
from tests.support.tiny_models import VOCAB, build

BLOCK = 64
XATTENTION = {"stride": 8, "block": BLOCK, "threshold": 0.3, "pool": "max"}
OPTIONS = {
    "dense": strict(passes=["dense"]),
    "sink_window": strict(passes=["sink_window"], sink_window={"sinks": 3, "window": 9}),
    "xattention": strict(passes=["xattention"], xattention=XATTENTION),
}
METHODS = tuple(OPTIONS)
CLOSE = 2e-5


@functools.cache
def model() -> torch.nn.Module:
    """Untrained attention is all but uniform; larger projections make it choose."""
    made = build("llama", layers=2)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return made


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(method: str | dict, *calls: dict) -> list[torch.Tensor]:
    """Logits of each call under one compilation; rewriting everything is part of the bargain."""
    options = OPTIONS[method] if isinstance(method, str) else method
    with compiled(model(), options) as plans:
        results = [model()(**inputs, use_cache=False).logits for inputs in calls]
        assert plans and all(d.method for plan in plans for d in plan.decisions)
    return results


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return difference(one, other) > 50 * CLOSE


def check_permuted_rows(method: str, length: int) -> None:
    ids, order = prompt(3, length), torch.tensor([2, 0, 1])
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, : length // 2] = 0, 0
    one, other = logits(method, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[order], "attention_mask": mask[order]})
    rows = mask[order].bool()
    assert difference(other[rows], one[order][rows]) < CLOSE
    assert differs(one[0, length - 1], one[2, length - 1])


def padded(ids: torch.Tensor, amount: int, side: str) -> dict[str, torch.Tensor]:
    """The prompt beside padding; positions count real tokens, as generate() does."""
    pad = ids.new_zeros(ids.shape[0], amount)
    parts = lambda content, fill: torch.cat([fill, content] if side == "left" else [content, fill], 1)
    mask = parts(torch.ones_like(ids), pad)
    return {"input_ids": parts(ids, pad), "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def check_padding(method: str | dict, side: str, amounts: tuple[int, ...], length: int = 40) -> None:
    """Beside more or less padding, the prompt's logits stay as they are."""
    ids = prompt(2, length)
    # the mask is there every time, or no padding would be another graph
    want, *others = logits(method, *(padded(ids, amount, side) for amount in (0, *amounts)))
    for amount, got in zip(amounts, others, strict=True):
        real = got[:, amount:] if side == "left" else got[:, : got.shape[1] - amount]
        assert difference(real, want) < CLOSE, amount


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.samples(1)
def test_permuting_batch_rows_permutes_outputs(method):
    check_permuted_rows(method, 6 * BLOCK if method == "xattention" else 30)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["dense", "sink_window"])
def test_amounts_of_padding_do_not_matter(method, side):
    check_padding(method, side, (1, 13))


@pytest.mark.slow
def test_left_padding_by_whole_blocks_does_not_matter_to_block_methods():
    check_padding("xattention", "left", (BLOCK, 2 * BLOCK), length=4 * BLOCK + 10)
    keep_all = strict(passes=["xattention"], xattention=XATTENTION | {"threshold": 1.0})
    check_padding(keep_all, "left", (7, 50), length=2 * BLOCK + 10)


@pytest.mark.slow
def test_left_padding_by_part_of_a_block_moves_the_blocks():
    """What block methods cannot promise: another alignment makes other blocks, so other choices."""
    with pytest.raises(AssertionError):
        check_padding("xattention", "left", (BLOCK // 2,), length=4 * BLOCK + 10)


@pytest.mark.slow
def test_right_padding_does_not_matter_to_block_methods():
    """Padding behind a prompt takes no part in any estimate."""
    check_padding("xattention", "right", (1, 30, BLOCK), length=4 * BLOCK + 10)


@pytest.mark.parametrize("method", ["dense", "sink_window"])
@pytest.mark.samples(1)
def test_appended_tokens_change_nothing_before_them(method):
    ids = prompt(1, 60)
    short, long = logits(method, {"input_ids": ids[:, :45]}, {"input_ids": ids})
    assert difference(long[:, :45], short) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"density": 1.0}, {"threshold": 1.0}])
def test_keeping_everything_is_dense(rule):
    inputs = {"input_ids": prompt(2, 3 * BLOCK + 5)}
    (dense,) = logits("dense", inputs)
    (kept,) = logits(strict(passes=["xattention"], xattention=XATTENTION | rule), inputs)
    (sparse,) = logits("xattention", inputs)
    assert difference(kept, dense) < CLOSE
    assert differs(sparse, dense)


# -- attention alone -------------------------------------------------------------------------------------------------------------------


def attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@torch.no_grad()
def attend(method: str | dict, *calls: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    torch._dynamo.reset()
    options = OPTIONS[method] if isinstance(method, str) else method
    function = torch.compile(attention, backend="sparsify", options=options, fullgraph=True)
    return [function(*call) for call in calls]


def operands(length: int = 4 * BLOCK, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(2, heads, length, 16, generator=generator)
    return 2 * draw(4), draw(2), draw(2)


@pytest.mark.parametrize("method", METHODS)
def test_scaling_values_scales_the_output(method):
    query, key, value = operands()
    one, four, sum_of_both = attend(method, (query, key, value), (query, key, 4 * value), (query, key, value + value.flip(-1)))
    assert torch.equal(four, 4 * one)
    assert difference(sum_of_both, one + one.flip(-1)) < CLOSE


def test_appended_tokens_change_xattention_within_the_last_block_only():
    """A block's choice depends on all its queries: rows of the last, unfinished block may change, those before it may not."""
    length, whole = 3 * BLOCK + 8, 3 * BLOCK
    every = operands(seed=2)  # here the eight rows alone choose other blocks than with those that follow them
    short, long = attend("xattention", tuple(x[:, :, :length] for x in every), every)
    assert difference(long[:, :, :whole], short[:, :, :whole]) < CLOSE
    assert differs(long[:, :, whole:length], short[:, :, whole:])


def test_appended_keys_of_another_kind_move_the_choice_of_an_estimate_in_8_bits():
    """Keys are rounded after the mean of them all is taken away, so later keys that lie elsewhere cost earlier ones their bits. An
    estimate without `int8` does not see them."""
    length, generator = 8 * BLOCK, torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, length + BLOCK, 16, generator=generator) for heads in (4, 2, 2))
    for estimate, away, moves in ([], 300.0, False), (["int8"], 3.0, False), (["int8"], 300.0, True):
        far = key.clone()
        far[:, :, length:] += away
        options = strict(passes=["xattention"], xattention=XATTENTION | {"estimate": estimate, "threshold": 0.7})
        short, long = attend(options, tuple(x[:, :, :length] for x in (query, key, value)), (query, far, value))
        assert differs(long[:, :, :length], short) == moves
        assert moves or difference(long[:, :, :length], short) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_permuting_heads_permutes_outputs(method):
    query, key, value = operands()
    one, other = attend(method, (query, key, value), (query.unflatten(1, (2, 2)).flip(1, 2).flatten(1, 2), key.flip(1), value.flip(1)))
    assert difference(other, one.flip(1)) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_added_to_all_keys_changes_nothing(method):
    """It adds one number to all logits of a row: the softmax does not see it, and no estimate may."""
    query, key, value = operands()
    one, other = attend(method, (query, key, value), (query, key + 0.25, value))
    assert difference(other, one) < CLOSE


def test_higher_thresholds_come_closer_to_dense():
    """Supersets of blocks carry more of each row's mass, so the error falls from step to step."""
    inputs = operands()
    (dense,) = attend("dense", inputs)
    errors = []
    for threshold in (0.1, 0.5, 0.9, 1.0):
        (got,) = attend(strict(passes=["xattention"], xattention=XATTENTION | {"threshold": threshold}), inputs)
        errors.append((got - dense).abs().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[2] > 0 and errors[3] < CLOSE
