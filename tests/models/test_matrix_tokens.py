"""Families under `token_select`: served ones equal the reference, others are refused for the reason that docs/support.md gives."""

import pytest
import torch

from tests.models import matrix_tokens
from tests.support.cases import every


@pytest.mark.parametrize("family", every(40, (*matrix_tokens.SERVED, *matrix_tokens.REFUSED)))
def test_family(family):
    torch._dynamo.reset()
    matrix_tokens.check(family)
    torch._dynamo.reset()
