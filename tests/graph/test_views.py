"""Every way to write a reordering of dimensions is read as what torch computes."""

from __future__ import annotations

import pytest
import torch

from sparsify.graph.views import permutation, transposed

_MATRICES = {  # the last two dimensions swapped
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "adjoint": lambda x: x.adjoint(),
    "torch.adjoint": lambda x: torch.adjoint(x),
    "transpose": lambda x: x.transpose(-2, -1),
    "transpose by name": lambda x: x.transpose(dim0=3, dim1=2),
    "mixed": lambda x: x.transpose(-1, dim1=2),
    "torch.transpose by name": lambda x: torch.transpose(input=x, dim1=-1, dim0=2),
    "swapaxes by name": lambda x: x.swapaxes(axis0=-1, axis1=-2),
    "torch.swapdims": lambda x: torch.swapdims(x, 2, 3),
    "permute": lambda x: x.permute(0, 1, -1, 2),
    "permute by one sequence": lambda x: x.permute((0, 1, 3, 2)),
    "permute by name": lambda x: x.permute(dims=(0, 1, 3, 2)),
    "torch.permute by name": lambda x: torch.permute(dims=(0, 1, 3, 2), input=x),
    "movedim": lambda x: x.movedim(-1, -2),
    "torch.moveaxis": lambda x: torch.moveaxis(x, (2, 3), (3, 2)),
}
_OTHERS = {
    "transpose of the middle": lambda x: x.transpose(1, 2),
    "permute of three": lambda x: x.permute(3, 0, 1, 2),
    "movedim by name": lambda x: x.movedim(destination=2, source=0),
    "movedim of two": lambda x: torch.movedim(x, (3, 0), (0, 1)),
    "no change": lambda x: x.transpose(1, 1),
}
_FLAT = {"T": lambda x: x.T, "H": lambda x: x.H, "t": lambda x: x.t(), "torch.t by name": lambda x: torch.t(input=x)}


def _last_node(program, x: torch.Tensor):
    found = []

    def backend(graph, inputs):
        found.extend(n for n in graph.graph.nodes if n.op in ("call_function", "call_method"))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend, dynamic=False, fullgraph=True)(x)
    return found[-1]


@pytest.mark.parametrize("name", [*_MATRICES, *_OTHERS])
def test_dimensions_of_four(name):
    x = torch.arange(120.0).view(2, 3, 4, 5)
    program = (_MATRICES | _OTHERS)[name]
    node = _last_node(program, x)
    source, order = permutation(node)
    assert source.op == "placeholder"
    assert torch.equal(x.permute(order), program(x))
    assert transposed(node) is (source if name in _MATRICES else None)


@pytest.mark.parametrize("name", _FLAT)
def test_dimensions_of_a_matrix(name):
    node = _last_node(_FLAT[name], torch.zeros(2, 3))
    assert permutation(node)[1] == (1, 0)
    assert transposed(node).op == "placeholder"


@pytest.mark.parametrize("name", ["mH", "adjoint", "torch.adjoint"])
def test_a_conjugate_is_no_reordering(name):
    assert permutation(_last_node(_MATRICES[name], torch.zeros(2, 3, 4, 5, dtype=torch.complex64))) is None


@pytest.mark.parametrize("program", [lambda x: x.data, lambda x: x.view(2, 3, 5, 4), lambda x: x.flip(-1)])
def test_other_calls(program):
    assert permutation(_last_node(program, torch.zeros(2, 3, 4, 5))) is None
