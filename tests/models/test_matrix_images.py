"""Families with images under `fastv` and `divprune`: served ones equal the reference, others are refused as docs/support.md says."""

import pytest
import torch

from tests.models import matrix_images

FAMILIES = (*matrix_images.SERVED, *matrix_images.REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", matrix_images.OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, name):
    torch._dynamo.reset()
    matrix_images.check(family, name)
    torch._dynamo.reset()
