"""No state of ours is shared by calls: what one compiled model, thread or tool asks for is nobody else's."""

from __future__ import annotations

import ast
import itertools
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsify import backends
from sparsify.api import record_density
from sparsify.backends import dispatch
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.ops.selection import SelectCall


@pytest.fixture
def served(monkeypatch):
    """What serves each attention op that runs, in order."""
    seen = []
    true = dispatch.available

    def available(device, kernels=None):
        kind, reason = true(device, kernels)
        if kernels is None:  # asked at run time
            seen.append((dispatch._wanted(), dispatch._strict.get()))
        return kind, reason

    monkeypatch.setattr(dispatch, "available", available)
    return seen


def compiled(**options):
    """Attention of a code object of its own, equal to no other, so that no other compiled function's entries are met."""
    scope = {"F": F}
    text = "return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=-0.5)"
    exec(f"def attend(q, k, v):\n    number = {next(NUMBERS)}\n    {text}\n", scope)
    return torch.compile(
        scope["attend"], backend="sparsify", options={"passes": ["dense"], "lower": "eager", "validation": False, **options}
    )


NUMBERS = itertools.count()
X = torch.randn(3, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_kernels_and_strict_belong_to_the_compiled_model(served):
    before, reference, strict = compiled(), compiled(kernels="reference"), compiled(strict=True)
    for call in (before, reference, compiled(), strict, before, reference):
        call(*X)
    assert served == [("auto", False), ("reference", False), ("auto", False), ("auto", True), ("auto", False), ("reference", False)]
    assert dispatch._kernels == "auto"


@torch.no_grad()
def test_the_process_default_serves_models_that_say_nothing(served):
    model, other = compiled(), compiled(kernels="reference")
    backends.use("triton")
    try:
        with pytest.raises(UnsupportedError, match="no GPU"):
            model(*X)
        other(*X)
    finally:
        backends.use("auto")
    assert [wanted for wanted, _ in served][-1] == "reference"


def test_threads_keep_what_is_said_in_them():
    gate, found = threading.Barrier(2), []

    def inside(kernels):
        with backends.serving(kernels):
            gate.wait()  # both are inside of their calls at once
            found.append((kernels, dispatch._wanted()))
            gate.wait()

    threads = [threading.Thread(target=inside, args=(kernels,)) for kernels in ("auto", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(wanted == kernels for kernels, wanted in found) and len(found) == 2


def test_an_error_ends_what_a_call_asked_for():
    with pytest.raises(ZeroDivisionError), backends.serving("reference", strict=True):
        raise ZeroDivisionError
    assert (dispatch._wanted(), dispatch._strict.get()) == ("auto", False)


def test_what_is_said_outside_holds_where_nothing_is_said_inside():
    with backends.serving("reference", strict=True), backends.serving():
        assert (dispatch._wanted(), dispatch._strict.get()) == ("reference", True)
    with pytest.raises(ConfigError, match="must be one of"), backends.serving("fast"):
        pass


def select():
    SelectCall(*torch.randn(2, 1, 1, 256, 16), scale=1.0, causal=True, pool="sum", stride=16, block_size=64, threshold=(0.9,)).run()


def test_a_recording_does_not_see_other_threads():
    with record_density() as densities:
        thread = threading.Thread(target=select)
        thread.start()
        thread.join()
        assert densities == []
        select()
        with record_density() as inner:
            select()
    select()
    assert (len(densities), len(inner)) == (2, 1)


MADE = {"dict", "set", "list", "bytearray"}


def state_of(path):
    """Module-level names that may change after the import: lower-case ones that hold containers or objects, and `global` ones."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            made = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
            container = isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)
            instance = made in MADE or made == "count" or (made.lstrip("_")[:1].isupper() and made not in ("ContextVar", "TypeVar"))
            if name.isidentifier() and not name.strip("_").isupper() and not name.startswith("__") and (container or instance):
                yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names


def test_every_state_of_the_process_is_written_down():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "how-it-works.md").read_text().partition("## State of the process")[2].partition("\n## ")[0]
    files = [path for folder in ("sparsify", "backends", "passes") for path in sorted((root / folder).rglob("*.py"))]
    found = {f"{path.stem}.{name}" for path in files for name in state_of(path)}
    assert {"dispatch._kernels", "source._modules", "feed_forward._thread", "trace._warned"} <= found
    short = set(re.findall(r"`([\w.]+)`", text))
    assert [name for name in sorted(found) if name not in short and name.partition(".")[2] not in short] == []
