"""What breaks around sparsify, and what users feed it: dense results or a clear error, never a wrong answer, never a crash."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

from sparsify import pipeline
from sparsify.backends import dispatch, registration
from sparsify.backends.codegen import source
from sparsify.backends.select import reference
from sparsify.errors import CacheFolderError, KernelError, UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.attention import AttentionCall
from sparsify.ops.selection import SelectCall
from tests.support.harness import compiled, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build

SPARSE = {"passes": ["xattention", "dense"], "xattention": {"block": 64, "threshold": 0.3}}
CLOSE = 2e-5


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def operands(length: int = 200, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, 2, length, 16, generator=generator) for _ in range(3))
    return [(3 * query).to(dtype), key.to(dtype), value.to(dtype)]


@torch.no_grad()
def attend(inputs, **options):
    torch._dynamo.reset()
    settings = {"lower": "eager", "min_length": 0, **SPARSE, **options}
    return torch.compile(attention, backend="sparsify", options=settings, fullgraph=True)(*inputs)


# -- kernels that fail -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch, caplog):
    """Pretends that Triton kernels serve this device and raise a given error, by op."""
    dispatch._warn_once.cache_clear()
    registration._warn_dense.cache_clear()
    errors: dict[str, Exception] = {}
    real = dispatch._implementation

    def implementation(op: str, kind: str):
        if kind == "reference":
            return real(op, kind)

        def kernel(*args, **call):
            if op in errors:
                raise errors[op]
            return real(op, "reference")(*args, **call)

        return kernel

    monkeypatch.setattr(dispatch, "available", lambda device, kernels=None: ("triton", "pretended"))
    monkeypatch.setattr(dispatch, "_implementation", implementation)
    caplog.set_level(logging.WARNING)
    return errors


@pytest.mark.parametrize("op", ["attention", "select_blocks"])
@pytest.mark.parametrize("error", [KernelError("ptxas exploded", where="some kernel"), CacheFolderError("others can write to it")])
def test_a_kernel_that_does_not_compile_gives_way_to_the_reference(broken, caplog, op, error):
    inputs = operands()
    want = attend(inputs, strict=True)
    broken[op] = error
    assert torch.equal(attend(inputs), want)
    assert torch.equal(attend(inputs), want)
    assert caplog.text.count(f"{op} runs the slow reference") == 1 and error.what in caplog.text
    with pytest.raises(type(error), match=error.what):
        attend(inputs, strict=True)


def test_a_kernel_that_is_demanded_and_fails_is_an_error(broken, monkeypatch):
    broken["select_blocks"] = KernelError("ptxas exploded")
    monkeypatch.setattr(dispatch, "_kernels", "triton")
    with pytest.raises(KernelError, match="ptxas exploded"):
        attend(operands())


def memory_errors():
    wrapped = KernelError("OutOfMemoryError: tried to allocate 17 GiB")
    wrapped.__cause__ = torch.OutOfMemoryError("tried to allocate 17 GiB")
    return [torch.OutOfMemoryError("tried to allocate 17 GiB"), wrapped]


@pytest.mark.parametrize("error", memory_errors(), ids=["bare", "wrapped"])
def test_an_estimate_without_memory_leaves_attention_dense(broken, caplog, error):
    inputs = operands()
    sparse, dense = attend(inputs, strict=True), attention(*inputs)
    broken["select_blocks"] = error
    for _ in range(2):
        torch.testing.assert_close(attend(inputs), dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert caplog.text.count("every block is visited") == 1
    with pytest.raises(type(error), match="17 GiB"):
        attend(inputs, strict=True)


@pytest.mark.parametrize("error", [None, MemoryError("17 GiB")], ids=["allocator", "python"])
def test_an_estimate_without_memory_on_a_cpu_leaves_attention_dense(monkeypatch, caplog, error):
    """torch's CPU allocator raises a plain RuntimeError."""
    registration._warn_dense.cache_clear()

    def greedy(call):
        if error is not None:
            raise error
        return torch.empty(1 << 60, dtype=torch.uint8)

    inputs = operands()
    dense = attention(*inputs)
    monkeypatch.setattr(reference, "importances", greedy)
    torch.testing.assert_close(attend(inputs), dense, atol=1e-5, rtol=1e-5)
    assert caplog.text.count("every block is visited") == 1
    with pytest.raises((RuntimeError, MemoryError), match=r"allocate memory|17 GiB"):
        attend(inputs, strict=True)


def test_other_errors_of_an_estimate_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(call):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(reference, "importances", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        attend(operands(), validation=False)


def test_strict_models_and_others_live_in_one_process(broken):
    """Being strict is a matter of the model that is called, not of the one that was compiled last."""
    broken["select_blocks"] = torch.OutOfMemoryError("no")
    inputs = operands()
    torch._dynamo.reset()
    options = {"lower": "eager", "min_length": 0, **SPARSE}
    easy = torch.compile(lambda *x: attention(*x) + 0, backend="sparsify", options=options)
    hard = torch.compile(lambda *x: attention(*x) + 1, backend="sparsify", options={**options, "strict": True})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(easy(*inputs), attention(*inputs), atol=1e-5, rtol=1e-5)
            with pytest.raises(torch.OutOfMemoryError):
                hard(*inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("query_len", "key_len", "start"), [(200, 200, None), (70, 200, None), (70, 260, 100), (70, 200, 0), (5, 3, None)])
def test_every_block_covers_whatever_could_be_selected(query_len, key_len, start, causal):
    query, key = torch.randn(2, 4, query_len, 16), torch.randn(2, 2, key_len, 16)
    flags = torch.ones(2, key_len, dtype=torch.uint8)
    flags[0, : key_len // 3] = 0
    call = {"query_start": None if start is None else torch.tensor([start]), "causal": causal, "block_size": 64, "scale": 0.25}
    call = SelectCall(query, key, key_flags=flags, threshold=(1.0,), **call)
    lists = registration.every_block(call)
    fake = call.empty_lists()
    assert [(x.shape, x.dtype, x.stride()) for x in lists] == [(x.shape, x.dtype, x.stride()) for x in fake]
    block_lists.check(*lists, query_len, key_len, key_len - query_len if start is None else start, 64, causal=causal)
    blocks = -(-key_len // 64)
    possible = block_lists.to_dense(*reference.select_blocks(call), blocks)
    assert not (possible & ~block_lists.to_dense(*lists, blocks)).any()


# -- the folder for generated code; more in test_source ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "_modules", {})
    monkeypatch.setattr(source, "_private", None)
    return tmp_path / "cache"


TEXT = "def answer():\n    return 42\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", TEXT[:10].encode(), b"x" * (1 << 20)], ids=["empty", "binary", "cut", "large"])
def test_corrupted_files_are_put_right(folder, content):
    source.load(TEXT, "a")
    (file,) = folder.iterdir()
    file.write_bytes(content)
    source._modules.clear()
    assert source.load(TEXT, "a").answer() == 42
    assert file.read_text() == TEXT


def test_a_folder_in_place_of_the_file_is_no_obstacle(folder):
    source.load(TEXT, "a")
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    source._modules.clear()
    module = source.load(TEXT, "a")
    assert module.answer() == 42 and Path(module.__file__).parent != folder


def test_a_folder_that_vanishes_is_made_again(folder):
    source.load(TEXT, "a")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    source._modules.clear()
    assert source.load(TEXT, "a").answer() == 42
    assert len(list(folder.iterdir())) == 1


# -- no triton -------------------------------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

import torch
from tests.pipeline.test_faults import attend, attention, operands
from sparsify.errors import UnsupportedError

assert "triton" not in sys.modules
inputs = operands()
sparse = attend(inputs, strict=True)
dense = attend(inputs, strict=True, passes=["dense"])
torch.testing.assert_close(dense, attention(*inputs), atol=1e-5, rtol=1e-5)
assert not torch.allclose(sparse, dense, atol=1e-3)
try:
    attend(inputs, strict=True, kernels="triton")
except Exception as error:
    assert "triton is not installed" in str(error), error
    print("refused")
"""


def test_without_triton_the_reference_serves_and_a_demand_is_refused():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"]


# -- bad input -------------------------------------------------------------------------------------------------------------------------


def test_a_dtype_that_is_not_served_stays_as_it_is():
    inputs = operands(40, torch.float64)
    torch._dynamo.reset()
    assert torch.equal(attend(inputs, strict=True), attention(*inputs))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def test_a_model_without_attention():
    model = Plain()
    x = torch.randn(4, 8)
    got = run(model, lambda m: m(x), strict(**SPARSE))
    assert torch.equal(got.value, model(x))
    assert got.graphs == 1 and got.sites == 0


@pytest.mark.parametrize("length", [1, 63, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))])
@pytest.mark.samples(1)
def test_a_prompt_shorter_than_a_block(length):
    model = build("llama", layers=2)
    call = lambda m: m(input_ids=prompt(2, length), use_cache=False).logits
    with torch.no_grad():
        want = call(model)
    for passes in (["xattention"], ["sink_window"], ["dense"]):
        got = run(model, call, strict(passes=passes))
        assert visible_error(got.value, want) < CLOSE


@pytest.mark.parametrize("method", ["xattention", "sink_window", "dense"])
@pytest.mark.parametrize("empty", [(1,), (0, 1, 2)], ids=["one row", "all rows"])
@pytest.mark.samples(2)
def test_rows_of_padding_alone_harm_nobody(method, empty):
    model, ids = build("llama", layers=2), prompt(3, 70)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[list(empty)] = 0
    call = lambda m: m(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad():
        want = call(model)
    got = run(model, call, strict(passes=[method], xattention={"threshold": 1.0}))
    assert got.rewritten(method) == 2
    assert got.value.isfinite().all()
    if mask.any():
        assert visible_error(got.value, want, mask) < CLOSE


def test_an_empty_batch():
    assert attend(operands(20, batch=0), strict=True).shape == (0, 2, 20, 16)


@pytest.mark.parametrize("options", [SPARSE, {"passes": ["dense"]}, {"passes": ["sink_window"], "sink_window": {"sinks": 2, "window": 30}}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_key_reaches_the_rows_that_see_it_and_no_other(options, bad):
    query, key, value = operands()
    clean = attend([query, key, value], **{"strict": True, **options})
    key[0, 1, 100, 3] = bad
    got = attend([query, key, value], **{"strict": True, **options})
    hit = torch.zeros(2, 2, 200, dtype=torch.bool)
    hit[0, 1, 100 : 130 if "sink_window" in options else 200] = True
    torch.testing.assert_close(got[~hit], clean[~hit])
    eager = attention(query, key, value)
    assert torch.equal(got[hit].isnan(), eager[hit].isnan()) if bad == float("inf") else got[hit].isnan().all()


def test_padding_that_is_not_a_number_harms_nobody():
    """Keys hidden by padding may hold anything."""
    ids = prompt(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    model = build("llama", layers=1)
    ids[0, :20] = 0
    call = lambda m: m(input_ids=ids, attention_mask=mask, use_cache=False).logits
    clean = [run(model, call, strict(passes=[method])).value for method in ("xattention", "sink_window", "dense")]
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.nan
    for method, want in zip(("xattention", "sink_window", "dense"), clean, strict=True):
        got = run(model, call, strict(passes=[method])).value
        assert visible_error(got, want, mask) < CLOSE


def test_a_device_or_dtype_that_an_op_does_not_serve_is_an_error_of_ours():
    query = torch.zeros(1, 2, 4, 8, dtype=torch.int32)
    with pytest.raises(UnsupportedError):
        AttentionCall(query, query, query, scale=1.0, causal=True).run()


def test_nothing_is_left_behind():
    """An error at run time leaves a compiled model usable."""
    model, ids = build("llama", layers=1), prompt(1, 70)
    with torch.no_grad(), compiled(model, strict(**SPARSE)):
        want = model(input_ids=ids, use_cache=False).logits
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            model(input_ids=ids.float(), use_cache=False)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


def test_a_restart_is_no_failure(monkeypatch, recwarn):
    """Lower stages ask for a new trace by an exception, after which floats are constants: a graph must not stay dense for it."""
    calls, lower = [], pipeline.lower

    def restarts_once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise TensorifyScalarRestartAnalysis
        return lower(*given)

    monkeypatch.setattr(pipeline, "lower", restarts_once)
    model = build("llama")
    ids = torch.arange(3, 99).reshape(1, -1)
    found = run(model, lambda m: m(ids).logits, strict(strict=False, passes=["dense"]))
    assert len(calls) == 2 and found.graphs == 1
    assert found.rewritten() == found.sites > 0
    assert not [w for w in recwarn if "untouched" in str(w.message)]
