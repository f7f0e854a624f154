"""The decoding loop on a real GPU: what a CUDA graph draws and stores is what transformers' loop draws and stores over the same cache."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sparsify
from sparsify import SparseCache
from sparsify.generation import generate
from sparsify.generation.decoding import loop
from sparsify.generation.decoding.runner import CudaGraphs, Recorded
from tests.generation.decoding.test_loop import CALLS, PADDED, SAMPLED, Recorder, same
from tests.support.cache_reference import text
from tests.support.harness import holding
from tests.support.tiny_models import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def model():
    model = build("llama").cuda()
    assert generate.install(model, shown=False) == ""
    return model


@pytest.fixture
def graphs(monkeypatch, model):
    """How often a step was recorded and replayed. What earlier tests recorded is kept for later calls, and would be replayed uncounted."""
    assert generate.install(model, shown=False) == ""
    counts, record = {"recorded": 0, "replayed": 0}, CudaGraphs.record

    def counted(self, function):
        replay = record(self, function)
        counts["recorded"] += 1

        def again():
            counts["replayed"] += 1
            replay()

        return again

    monkeypatch.setattr(CudaGraphs, "record", counted)
    return counts


def on_device(arguments):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def run(model, stock=False, seed=0, **arguments):
    """Result, next random numbers and stream; `stock`: of transformers' own loop over the same kind of cache."""
    torch.manual_seed(seed)
    recorder = Recorder()
    arguments = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2, 11, 30], **on_device(arguments)}
    if stock:
        result = type(model).generate(model, **arguments, **holding(SparseCache(model.config, "full")), streamer=recorder)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="sparsify decodes without")
            result = model.generate(**arguments, streamer=recorder)
    return result, torch.rand(2, device="cuda"), (recorder.put_tokens, recorder.ended)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"guided", "chunks"}))
def test_tokens_draws_and_streams(model, graphs, name):
    longest = 0
    for seed in range(3):
        got = run(model, seed=seed, **CALLS[name])
        same(got, run(model, stock=True, seed=seed, **CALLS[name]))
        longest = max(longest, len(got[2][0]))
    # the first steps are not recorded, and some calls end within them
    assert graphs["recorded"] <= 1 and (graphs["replayed"] > 0 or longest < 8)


@pytest.mark.parametrize("eos", range(20, 60, 4))
def test_a_step_too_many_leaves_no_trace(model, eos):
    """Rows end at many different tokens; the host learns it one token late."""
    arguments = {**PADDED, **SAMPLED, "eos_token_id": list(range(eos, eos + 12))}
    same(run(model, **arguments), run(model, stock=True, **arguments))


def test_scores_and_a_second_turn(model):
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments = {**PADDED, **SAMPLED, **kept}
    same(run(model, **arguments), run(model, stock=True, **arguments))
    cache, other = (SparseCache(model.config, "full") for _ in range(2))
    ids = text(2, 20).cuda()
    for seed in range(3):
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": True}
        got = run(model, seed=seed, **call, **holding(cache))
        torch.manual_seed(seed)
        common = {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": [2, 11, 30]}
        want = type(model).generate(model, **call, **common, **holding(other))
        assert torch.equal(got[0], want) and cache.get_seq_length() == other.get_seq_length()
        ids = torch.cat([want, text(2, 5, seed=seed + 7).cuda()], 1)


def test_a_recording_that_fails_leaves_the_generator_as_it_was():
    device, found = torch.device("cuda"), torch.ones(1, device="cuda")
    torch.manual_seed(3)
    want = torch.rand(4, device=device), torch.rand(4, device=device)
    torch.manual_seed(3)

    def reads() -> None:
        found.mul_(float(found))

    step = Recorded(reads, CudaGraphs(device))
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        for _ in range(4):
            step()
    assert torch.equal(torch.rand(4, device=device), want[0])
    drawn = torch.zeros(4, device=device)
    recorded = CudaGraphs(device).record(lambda: drawn.copy_(torch.rand(4, device=device)))
    recorded()
    assert torch.equal(drawn, want[1])


def test_a_cache_grows(model, graphs, monkeypatch):
    monkeypatch.setattr(loop, "_ROOM", 4)
    arguments = {"input_ids": text(2, 60), "max_new_tokens": 300, "eos_token_id": None}
    same(run(model, **arguments), run(model, stock=True, **arguments))
    assert graphs["recorded"] > 1


def test_threads(model):
    jobs = [CALLS[name] for name in ("greedy", "batch", "padded", "penalty", "suppressed", "min_length")] * 3
    want = [run(model, stock=True, **job)[0] for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: run(model, **job)[0], jobs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_threads_that_draw_do_not_stop_each_other(model):
    """Recording forbids drawing; the loop keeps the two apart."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(model, seed=0, **job)[0], [CALLS["sampled padded"], CALLS["sampled"]] * 4))
    assert all(result.shape[1] > 20 for result in found)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_window"])
def test_compiled(family, graphs):
    """Through sparsify.compile, whose regions are what the graph holds."""
    model, other = build(family).cuda(), build(family).cuda()
    torch._dynamo.reset()
    sparsify.compile(model, progress=False)
    for arguments in (PADDED, {**PADDED, "input_ids": text(3, 20, seed=9)}, CALLS["penalty"]):
        got, want = run(model, **arguments)[0], run(other, stock=True, **arguments)[0]
        assert torch.equal(got, want)
    assert graphs["recorded"] == 2 and graphs["replayed"] > 20
    torch._dynamo.reset()
