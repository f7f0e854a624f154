"""What follows tokens that are left out: masks asked for other places, and layers that keep a window's places; beside plain indexing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from sparsify.errors import CacheError
from sparsify.generation.regions import following
from sparsify.generation.regions.left_out import NarrowedLayer, NarrowedSlidingLayer
from sparsify.generation.regions.masks import Recipe, groups, kinds, of_columns, of_one_text

TOKENS = 12
IDS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1], [0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1]])
CONDITIONS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(4),
    "groups": or_masks(causal_mask_function, blockwise_overlay(IDS)),
    "window and groups": and_masks(sliding_window_overlay(4), or_masks(causal_mask_function, blockwise_overlay(IDS))),
}


@pytest.mark.parametrize("condition", [causal_mask_function, sliding_window_causal_mask_function(4)], ids=["causal", "window"])
def test_one_text_in_each_row_is_not_packed(condition) -> None:
    """As transformers finds it where nothing compiles anywhere in the process."""
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function)
    positions = torch.arange(TOKENS).expand(2, -1) + torch.tensor([[0], [5]])
    both = lambda numbers: and_masks(remap(condition, positions), packed_sequence_mask_function(numbers))
    one, two = torch.zeros(2, TOKENS, dtype=torch.int64), torch.arange(TOKENS).expand(2, -1) // 7
    assert of_one_text(both(one)) is condition
    for other in (both(two), both(torch.stack([one[0], two[0]])), condition, and_masks(condition, blockwise_overlay(IDS)), None):
        assert of_one_text(other) is other
    beside = and_masks(remap(condition, positions), blockwise_overlay(IDS), packed_sequence_mask_function(one))
    left, at = of_one_text(beside), [torch.arange(TOKENS)[:, None], torch.arange(TOKENS)]
    assert torch.equal(left(0, 0, *at), beside(0, 0, *at)) and kinds(left) == kinds(condition) | {"groups"}
    assert not torch.equal(both(two)(0, 0, *at), condition(0, 0, *at))


def recipe(condition, query_len: int, query_start: int) -> Recipe:
    call = {"batch_size": 2, "q_length": query_len, "kv_length": TOKENS, "q_offset": query_start, "kv_offset": 0}
    return Recipe(sdpa_mask, {**call, "mask_function": condition, "allow_is_causal_skip": False, "local_size": 4, "device": "cpu"})


def test_what_conditions_are_made_of() -> None:
    assert kinds(CONDITIONS["causal"]) == {"causal"} and kinds(CONDITIONS["window"]) == {"causal", "window"}
    assert kinds(CONDITIONS["window and groups"]) == {"causal", "window", "groups"}
    assert groups(CONDITIONS["causal"]) == [] and groups(CONDITIONS["window and groups"]) == [IDS]
    for other in (chunked_overlay(4, torch.zeros(2, dtype=torch.int)), packed_sequence_mask_function(IDS), lambda b, h, q, k: k <= q, None):
        assert kinds(other) is None
        assert kinds(and_masks(causal_mask_function, other)) is None if other is not None else True


@pytest.mark.parametrize("name", CONDITIONS)
def test_masks_at_other_places(name: str) -> None:
    columns = torch.tensor([[0, 2, 3, 7, 8], [1, 2, 4, 6, 8]])
    whole = recipe(CONDITIONS[name], TOKENS, 0).make()
    prompt = of_columns(recipe(CONDITIONS[name], 9, 0), 0, columns, q_length=5, kv_length=5).make()
    rows = torch.arange(2)[:, None, None]
    assert torch.equal(prompt[:, 0], whole[rows, 0, columns[:, :, None], columns[:, None]])
    # a later call of two tokens behind one that came before, over five of the prompt's nine
    held = torch.cat((columns, torch.tensor([[9, 10, 11]]).expand(2, 3)), 1)
    later = of_columns(recipe(CONDITIONS[name], 2, 6), 4, columns, kv_length=8).make()
    assert torch.equal(later[:, 0], whole[rows, 0, torch.tensor([10, 11])[None, :, None], held[:, None]])


@pytest.mark.parametrize("window", [4, 9, 30])
def test_a_window_keeps_places(window: int) -> None:
    columns, tokens = torch.tensor([[0, 2, 5, 6, 9], [1, 2, 3, 7, 9]]), 10
    layer = DynamicSlidingWindowLayer(window)
    layer.__class__ = NarrowedSlidingLayer
    assert isinstance(layer, NarrowedSlidingLayer)
    layer.columns, layer.fixed = (columns,), 9
    rows = torch.randn(2, 3, 5, 8)
    layer.update(rows, 2 * rows)
    layer.spread(tokens)
    kept = min(window - 1, tokens)
    assert layer.keys is not None and layer.values is not None and layer.keys.shape == (2, 3, kept, 8) and layer.get_seq_length() == tokens
    for row in range(2):
        for place in range(tokens - kept, tokens):
            at = columns[row].tolist().index(place) if place in columns[row] else None
            want = torch.zeros(3, 8) if at is None else rows[row, :, at]
            assert torch.equal(layer.keys[row, :, place - tokens + kept], want)
            assert torch.equal(layer.values[row, :, place - tokens + kept], 2 * want)
    assert layer.gaps(1) == ((kept + 1, tokens - kept) if tokens - kept < 9 else None)
    if layer.gaps(1):
        with pytest.raises(CacheError, match="one mask for all layers"):
            layer.get_mask_sizes(1)
    there = layer.holds(tokens + 2)
    assert [row.nonzero()[:, 0].tolist() for row in there] == [[*one, 10, 11] for one in columns.tolist()]
    if window > tokens:
        with pytest.raises(CacheError, match="cannot be taken back"):
            layer.crop(-2)
        with pytest.raises(CacheError, match="crop takes a negative number"):
            layer.crop(tokens)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.columns[0].tolist() == [[1, 2, 3, 7, 9]]
    layer.reset()
    assert layer.columns == () and layer.gaps(1) is None


def test_a_narrowed_layer_is_cropped_by_how_many_go() -> None:
    """Releases that take the text's new length would count tokens that it was not given."""
    layer = NarrowedLayer()
    layer.update(torch.randn(1, 1, 7, 4), torch.randn(1, 1, 7, 4))
    layer.fixed, layer.left_out = 5, 20
    for tokens, what in ((6, "negative number"), (27, "negative number"), (-3, "3 cannot be taken back")):
        with pytest.raises(CacheError, match=what):
            layer.crop(tokens)
    layer.crop(-2)
    assert layer.keys.shape[2] == 5


def test_groups_stand_side_by_side() -> None:
    assert bool(following.side_by_side(IDS)) and bool(following.side_by_side(torch.full((2, 5), -1)))
    assert bool(following.side_by_side(torch.zeros(2, 5, dtype=torch.int64)))
    assert not bool(following.side_by_side(torch.tensor([[0, 0, -1, 0], [0, 0, 0, 0]])))
    assert not bool(following.side_by_side(torch.tensor([[0, 1, 0, 1]])))
