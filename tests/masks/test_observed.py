"""What is read off a mask's values is what was put into them, and one changed element makes it something else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.masks.observed import Constant, Visibility, observe, run, visible

PAIRS = [(True, False), (False, True), (0.0, -torch.inf), (0.0, torch.finfo(torch.bfloat16).min), (1.0, 0.0), (1, 0)]


@st.composite
def masks(draw):
    """A mask of known clauses, the number that shows and the number that hides."""
    query_len = draw(st.integers(2, 7))
    key_len = query_len + draw(st.integers(0, 4))
    start = draw(st.sampled_from([0, 1, key_len - query_len]))
    q, k = torch.arange(query_len)[:, None] + start, torch.arange(key_len)[None]
    seen = k <= q
    if draw(st.booleans()):
        seen = seen & (k > q - draw(st.integers(1, 5)))
    elif query_len == key_len and start == 0 and draw(st.booleans()):
        numbers = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=key_len, max_size=key_len)))
        seen = seen & (numbers == numbers[:, None])
    if draw(st.booleans()):
        left = torch.tensor(draw(st.lists(st.integers(0, key_len - 1), min_size=2, max_size=2)))
        seen = seen & (k >= left[:, None])[:, None, None]
    if draw(st.booleans()) and seen.dim() == 4:
        seen = seen.expand(-1, 3, -1, -1)
    shown, hidden = draw(st.sampled_from(PAIRS))
    dtype = {bool: torch.bool, int: torch.int32, float: torch.bfloat16}[type(shown)]
    return torch.where(seen, torch.tensor(shown, dtype=dtype), torch.tensor(hidden, dtype=dtype)), seen


@settings(max_examples=150, deadline=None)
@given(masks(), st.data())
def test_clauses_are_read_off_and_hold_for_that_mask_alone(made, data):
    mask, seen = made
    form = observe(mask)
    if bool(seen.all()) or not bool(seen.any()):
        assert form == Constant(mask.flatten()[0].item())
        return
    assert isinstance(form, Visibility), mask
    says = lambda tensor: visible(form, tensor, tensor.shape[-2:], tensor.device, run).expand(tensor.shape) == (tensor == form.shown)
    assert bool(says(mask).all())
    assert (form.shown, form.hidden) in ((mask[seen][0].item(), mask[~seen][0].item()), (mask[~seen][0].item(), mask[seen][0].item()))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in mask.shape)
    other = mask.clone()
    other[place] = form.hidden if mask[place] == form.shown else form.shown
    again = observe(other)
    # a form that holds for both takes what differs from the mask itself: keys that are tokens, documents, the start
    assert not bool(says(other).all()) or again == form or form.tokens or form.documents or form.start == "tensor"


Q, K = torch.arange(6)[:, None], torch.arange(6)[None]


@pytest.mark.parametrize(
    "mask",
    [
        (K <= Q) & (K != Q - 2),
        (K <= Q) ^ (Q == 3) & (K == 1),
        torch.stack([K <= Q, K < Q]),
        torch.where(K <= Q, 0.0, torch.where(K > Q + 2, -torch.inf, -1.0)),
        torch.where(K <= Q, 0.0, torch.nan),
        (K <= Q).to(torch.complex64),
        torch.zeros(6, dtype=torch.bool),
        torch.zeros(0, 6),
    ],
)
def test_anything_else_has_no_form(mask):
    assert observe(mask) is None


def test_a_row_that_sees_one_key_more_is_no_causal_mask():
    mask = K <= Q
    for q, k in ((0, 1), (2, 5), (4, 5)):
        other = mask.clone()
        other[q, k] = True
        form = observe(other)
        assert form is None or form.shown is False, "what it hides may have a form"
