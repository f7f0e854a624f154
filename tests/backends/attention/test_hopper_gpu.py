"""The generated Hopper kernels on a GPU: the whole matrix, poisoned outputs, two runs bit by bit, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sanitizer import attention_cases
from sparsify.backends.attention import hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not hopper.ready(torch.device("cuda")), reason="no Hopper GPU"),
]
CASES = attention_cases.matrix()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    found = attention_cases.check(CASES[name])
    assert found["served"], found["reason"]
    assert found["ok"], found["problems"]


def test_graphs_and_streams():
    found = attention_cases.check_capture()
    assert found["ok"], found["problems"]
