"""divprune's rule; what it does to models, `test_image_passes` says."""

from __future__ import annotations

import torch

from sparsify.planning.method import ImageRows
from sparsify.planning.registry import discover
from tests.support.image_selection import rows


def test_what_lies_apart_goes_on():
    angles = torch.tensor([0.0, 0.5, 1.0, 1.02, 2.5, 0.0]) * torch.pi / 3
    hidden = torch.stack((angles.cos(), angles.sin()), -1)[None] * torch.tensor([1.0, 5, 2, 1, 9, 1])[:, None]
    method = discover()["divprune"](keep=2)
    # the one whose nearest other is furthest is 4, furthest from it 1, and from both 3
    assert method.choose(rows(hidden, [1, 2, 3, 4], 4)).tolist() == [[0, 1, 4, 5]]
    assert method.choose(rows(hidden, [1, 2, 3, 4], 5)).tolist() == [[0, 1, 3, 4, 5]]


def test_rows_with_fewer_images_than_are_taken():
    draw = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    is_image = torch.zeros(3, 12, dtype=torch.bool)
    is_image[0, 1:11] = is_image[1, 2:4] = True
    columns = discover()["divprune"](keep=9).choose(ImageRows(draw, None, torch.ones_like(is_image), is_image, 11))
    gone = [{*range(12)} - {*row} for row in columns.tolist()]
    assert gone[0] <= {*range(1, 11)} and gone[1] <= {2, 3} and all(len(one) == 1 for one in gone)


def test_copies_of_a_token_come_last():
    hidden = torch.eye(6, 8)[[0, 1, 1, 2, 1, 3]][None]
    columns = discover()["divprune"](keep=3).choose(rows(hidden, [1, 2, 3, 4], 4))
    assert 3 in columns[0] and len({*columns[0].tolist()} & {1, 2, 4}) == 1
