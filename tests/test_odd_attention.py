"""Attention as people write it, odd forms included: what is rewritten gives the right answer, keeping all and dropping a lot, and the
rest is refused for a known reason. The answer under sinks and a window comes from masking the program's own scores from outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from tests.harness import strict
from tests.matrix_reference import _SinkWindow

BATCH, HEADS, LENGTH, DIM = 2, 4, 24, 16
SINKS, WINDOW = 2, 3
KEEP_ALL = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention"], "xattention": {"threshold": 1.0, "block": 64}},
    "sink_window": {"passes": ["sink_window"], "sink_window": {"sinks": SINKS, "window": 1 << 20}},
}
SPARSE = {"passes": ["sink_window"], "sink_window": {"sinks": SINKS, "window": WINDOW}}


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator).to(dtype) for _ in range(3)]


def causal(query_len: int = LENGTH, key_len: int = LENGTH) -> torch.Tensor:
    return torch.arange(key_len)[None] <= torch.arange(query_len)[:, None] + key_len - query_len


@torch.no_grad()
def compiled(function, inputs, options):
    """Result and plan decisions."""
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        result = torch.compile(function, backend="sparsify", options=strict(**options), fullgraph=True)(*(x.clone() for x in inputs))
    return result, [d for plan in plans for d in plan.decisions]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.dtype is want.dtype and got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() < tolerance


# -- one attention behind another ------------------------------------------------------------------------------------------------------


def shared_keys(query, key, value):
    """Two layers over one cache, the second's query being the first's output itself."""
    first = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(first, key, value, is_causal=True)


def output_as_values(query, key, value):
    first = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, first, first, is_causal=True)


@pytest.mark.parametrize("function", [shared_keys, output_as_values])
def test_an_attention_over_anothers_output_reads_the_rewritten_one(function):
    inputs = operands()
    got, decisions = compiled(function, inputs, SPARSE)
    assert [d.method for d in decisions] == ["sink_window"] * 2
    with _SinkWindow(SINKS, WINDOW, [False], 0, False):
        want = function(*inputs)
    close(got, want)


# -- autocast --------------------------------------------------------------------------------------------------------------------------


def under_autocast(query, key, value):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def partly_under_autocast(query, key, value):
    """As with rotary positions in float32: queries and keys are wide, values are not."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value @ torch.eye(DIM), is_causal=True)


def written_out_under_autocast(query, key, value):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(~causal(), float("-inf"))
        return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize("function", [under_autocast, partly_under_autocast, written_out_under_autocast])
@pytest.mark.parametrize("method", [*KEEP_ALL])
def test_autocast_converts_the_operands(function, method):
    inputs = operands()
    got, decisions = compiled(function, inputs, KEEP_ALL[method])
    assert [d.method for d in decisions] == [method]
    rounded = [x.bfloat16().double() for x in inputs]
    exact = F.scaled_dot_product_attention(*rounded, is_causal=True)
    close(got, exact.to(torch.bfloat16), 1e-2)


def test_products_within_an_op_are_not_autocast():
    """Large scores show it: rounded to bfloat16 they are off by whole units."""
    query, key, value = (x.bfloat16() for x in operands())
    query = 16 * query

    def attend(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True).to(torch.bfloat16)
    for method in ("xattention", "sink_window"):
        close(compiled(attend, (query, key, value), KEEP_ALL[method])[0], exact, 1e-2)


def test_dtypes_that_differ_for_another_reason_are_refused():
    """Wide queries and keys without autocast: rounding them would be a loss."""

    def function(query, key, value):
        scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(~causal(), float("-inf"))
        return torch.softmax(scores, -1).to(value.dtype) @ value

    query, key, value = operands()
    _, decisions = compiled(function, (query, key, value.bfloat16()), KEEP_ALL["dense"])
    assert [d.method for d in decisions] == [None] and "differ in dtype" in decisions[0].reason
