"""Plans of a divided text say what travels, and how many bytes at most."""

from __future__ import annotations

import pytest

from sparsify.costs import links
from sparsify.costs.sizes import AttentionSizes
from sparsify.passes.xattention import XAttention
from sparsify.planning.method import Context
from tests.planning.test_plan import H200, plan_for, site

TOKENS, PROCESSES = 1 << 18, 2
WHOLE = AttentionSizes(query_len=TOKENS, key_len=TOKENS)
KEYS = links.key_value_bytes(WHOLE, PROCESSES)
CELLS = links.cell_bytes(WHOLE, PROCESSES, XAttention().variants, XAttention().stride, 128)
# by method: what its note says, and bytes
SAID = {
    "dense": ("all keys and values", KEYS),
    "xattention": ("the estimate's cells and visited keys and values", KEYS + CELLS),
    "sink_window": ("keys and values of sinks and windows", links.window_bytes(WHOLE, PROCESSES, 4 + 4096)),
}


@pytest.mark.parametrize("method", SAID)
def test_a_plan_says_what_travels(method):
    """Of the whole text, though the site has one process's part."""
    options = {"passes": [method], "min_length": 0} | ({"sink_window": {"window": 4096}} if method == "sink_window" else {})
    context = Context(H200, "triton", 0, sequence="group", tokens=TOKENS, processes=PROCESSES)
    decision = plan_for(site(TOKENS // PROCESSES), context, **options)
    what, size = SAID[method]
    assert decision.method == method
    assert f"; {what} travel, at most {links.shown(size)} of {TOKENS} tokens" in decision.reason
    assert "travel" not in plan_for(site(TOKENS // PROCESSES), Context(H200, "triton", 0), **options).reason


def test_bytes_for_people():
    assert [links.shown(size) for size in (0, 999, 1536, 268435456, 1.5e12)] == ["0 bytes", "999 bytes", "1.54 kB", "268 MB", "1.5e+03 GB"]
