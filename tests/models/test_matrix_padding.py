"""Families under `unpad`: served ones equal eager execution, others are refused for the reason that docs/support.md gives."""

import pytest
import torch

from tests.models import matrix_padding
from tests.support.cases import every


@pytest.mark.parametrize(
    ("family", "side"),
    every(
        100,
        [(family, side) for family in ("mistral_window", *matrix_padding.REFUSED, *matrix_padding.SERVED) for side in ("left", "right")],
    ),
)
def test_family(family, side):
    torch._dynamo.reset()
    matrix_padding.check(family, side)
    torch._dynamo.reset()
