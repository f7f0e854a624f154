"""Ways of sharing together: heads and prompts at once, and heads with tokens that go on behind a layer."""

from __future__ import annotations

import pytest
import torch

from tests.support import context_parallel, processes, tensor_parallel
from tests.support.cache_reference import left_padded, text

LENGTH = 300
METHODS = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention", "dense"], "xattention": {"threshold": (0.1, 0.3, 0.2, 0.4), "estimate": []}},
    "sink_window": {"passes": ["sink_window", "dense"], "sink_window": {"sinks": 2, "window": (40, 0, 64, 20)}},
    "minference": {
        "passes": ["minference", "dense"],
        "minference": {"columns": (64, 0, 128, 0), "diagonals": 0, "queries": 8, "block": 64},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("generated", [False, True])
def test_heads_and_prompts_divided_at_once(generated):
    """Two times two processes give what one gives; numbers per head go to the heads, whatever part of the prompt a process has."""
    cases = {
        f"{name} {mask is not None}": (text(2, LENGTH), mask, options, generated)
        for name, options in METHODS.items()
        for mask in (None, left_padded([LENGTH, LENGTH - 61]))
        if not generated or mask is None or name == "xattention"
    }
    want = context_parallel.both("llama", cases, (1, 1), {})
    for name, case in cases.items():  # each within the processes' patience
        for found in processes.run(4, context_parallel.both, "llama", {name: case}, (2, 2), {}):
            result, methods = found[name]
            # a token's step is one op where all slots are here
            assert methods == [None if method == "kv_evict" else method for method in want[name][1]], name
            if generated:
                assert torch.equal(result, want[name][0]), name
                continue
            real = torch.ones(result.shape[:2], dtype=torch.bool) if case[1] is None else case[1].bool()
            torch.testing.assert_close(result[real], want[name][0][real], atol=3e-5, rtol=1e-4, msg=lambda t, name=name: f"{name}: {t}")
    assert all(("kv_evict" in methods) is generated for _, methods in want.values())
    if not generated:
        assert all((want[f"{name} False"][0] - want["dense False"][0]).abs().max() > 1e-2 for name in METHODS if name != "dense")


CHOICE = {"layer": 0, "heads": (0, 3), "keep": 60, "window": 8, "sinks": 2, "queries": 8}
SELECT = {
    "some": {"passes": ["dense", "token_select"], "token_select": CHOICE},
    "all": {"passes": ["dense", "token_select"], "token_select": CHOICE | {"heads": "all", "group": "max"}},
    "none": {"passes": ["dense"]},
}


@pytest.mark.slow
def test_the_tokens_that_go_on_are_chosen_by_all_heads():
    """Heads that choose may be another process's: what each has seen is put together before the choice."""
    cases = {
        f"{name} {mask is not None}": (text(2, 200), mask, options, None)
        for name, options in SELECT.items()
        for mask in (None, left_padded([200, 139]))
    }
    want = tensor_parallel.all_of("tokens", "llama", cases, False, {})
    for found in processes.run(2, tensor_parallel.all_of, "tokens", "llama", cases, True, {}):
        for name, (result, _) in found.items():
            assert torch.equal(result, want[name][0]), name
    assert any(not torch.equal(want[f"{name} False"][0], want["none False"][0]) for name in ("some", "all"))
