"""The generated Hopper kernels on a GPU: the whole matrix, poisoned outputs, two runs bit by bit, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernel_checks
from sparsify.backends import gluon_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not gluon_attention.ready(torch.device("cuda")), reason="no Hopper GPU"),
]
CASES = kernel_checks.matrix()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    found = kernel_checks.check(CASES[name])
    assert found["served"], found["reason"]
    assert found["ok"], found["problems"]


def test_graphs_and_streams():
    found = kernel_checks.check_capture()
    assert found["ok"], found["problems"]
