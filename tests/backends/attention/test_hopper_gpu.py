"""The generated Hopper kernels on a GPU: the whole matrix, poisoned outputs, two runs bit by bit, against the reference in fp64.

With `--record-run`, each call's result is appended to benchmarks/results/kernels.jsonl, which the README quotes.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import Kernels
from benchmarks.lib import records
from sparsify.backends.attention import hopper
from tests.support import hopper_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not hopper.ready(torch.device("cuda")), reason="no Hopper GPU"),
]
CASES = hopper_calls.matrix()


@pytest.fixture
def keep(request):
    def keep(case, found):
        if request.config.getoption("--record-run"):
            records.append(records.RESULTS / "kernels.jsonl", Kernels(section="check", case=case, more=found))

    return keep


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, keep):
    found = hopper_calls.check(CASES[name])
    keep(name, found)
    assert found["served"], found["reason"]
    assert found["ok"], found["problems"]


def test_graphs_and_streams(keep):
    found = hopper_calls.check_capture()
    keep("capture", found)
    assert found["ok"], found["problems"]
