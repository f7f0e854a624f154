"""generate() of a compiled model gives the tokens, scores and streams of transformers' own loop, under the same seeds."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerationMixin

import sparsify
from sparsify import SparseCache
from sparsify.generation import compat, generate
from sparsify.generation.caches import kept as kept_caches
from sparsify.generation.caches.kept import KeptCaches
from sparsify.generation.decoding import loop, runner
from sparsify.generation.decoding.model_state import hooked, model_state
from sparsify.generation.decoding.runner import Recorded
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.op_recorder import HostRead, NoReads, OpRecorder
from tests.support.tiny_models import EAGER_ONLY, VOCAB, build

NEW = 12


class Calls:
    """What the loop was given, and with what."""

    def __init__(self, monkeypatch):
        self.found, decode = [], loop.decode

        def spy(*args, **kwargs):
            self.found.append((args, kwargs))
            return decode(*args, **kwargs)

        monkeypatch.setattr(loop, "decode", spy)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch).found


@pytest.fixture(scope="module")
def llama():
    return installed(build("llama"))


@pytest.fixture(scope="module")
def twin():
    """The same model under transformers' own loop."""
    return build("llama")


def installed(model):
    assert generate.install(model, shown=False) == ""
    return model


class Recorder(BaseStreamer):
    def __init__(self):
        self.put_tokens, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.put_tokens.append(value.clone())

    def end(self):
        self.ended += 1


PADDED = {"input_ids": text(3, 20), "attention_mask": left_padded([20, 13, 7])}
PLAIN = {"input_ids": text(1, 20)}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9}
CALLS = {
    "greedy": PLAIN,
    "batch": {"input_ids": text(2, 20)},
    "padded": PADDED,
    "sampled": {**PLAIN, **SAMPLED},
    "sampled padded": {**PADDED, "do_sample": True},
    "returned sequences": {**PADDED, **SAMPLED, "num_return_sequences": 3},
    "penalty": {**PADDED, "repetition_penalty": 1.7},
    "penalty sampled": {**PADDED, **SAMPLED, "repetition_penalty": 1.3},
    "min_p": {**PLAIN, "do_sample": True, "min_p": 0.05},
    "typical": {**PLAIN, "do_sample": True, "typical_p": 0.7},
    "epsilon": {**PLAIN, "do_sample": True, "epsilon_cutoff": 0.005},
    "eta": {**PLAIN, "do_sample": True, "eta_cutoff": 0.01},
    "top_h": {**PLAIN, "do_sample": True, "top_h": 0.5},
    "normalised": {**PLAIN, "do_sample": True, "renormalize_logits": True, "remove_invalid_values": True},
    "ngrams": {**PADDED, "no_repeat_ngram_size": 2},
    "bad words": {**PADDED, "bad_words_ids": [[5], [7, 9], *([i] for i in range(40, 80))]},
    "bias": {**PADDED, "sequence_bias": [[[14], 4.0], [[12, 13], 2.0]]},
    "shorter than": {**PADDED, "min_new_tokens": 6, "eos_token_id": list(range(3, 100))},
    "min_length": {**PADDED, "min_length": 25, "eos_token_id": list(range(3, 100))},
    "suppressed": {**PADDED, "suppress_tokens": list(range(50, 128)), "begin_suppress_tokens": list(range(3, 30))},
    "forced end": {**PADDED, "forced_eos_token_id": 5, "eos_token_id": 5},
    "forced begin": {"input_ids": torch.tensor([[1]]), "forced_bos_token_id": 9},
    "decay": {**PADDED, "exponential_decay_length_penalty": (2, 1.5)},
    "allowed": {**PADDED, "prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + int(row), 60))},
    "watermark": {**PLAIN, "do_sample": True, "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
    "guided": {**PLAIN, "guidance_scale": 1.5},
    "chunks": {**PLAIN, "prefill_chunk_size": 6},
}


def run(model, seed=0, streamer=True, **arguments):
    """Everything that a call leaves behind."""
    stream = {"streamer": (recorder := Recorder())} if streamer else {}
    torch.manual_seed(seed)
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2, 11, 30, 31, 32, 33], **arguments}
    result = model.generate(**arguments, **stream)
    return result, torch.rand(2), (recorder.put_tokens, recorder.ended) if streamer else None


def same(got, want):
    assert type(got[0]) is type(want[0])
    torch.testing.assert_close(got[1:], want[1:], rtol=0, atol=0)
    if isinstance(got[0], torch.Tensor):
        assert torch.equal(got[0], want[0])
        return
    assert torch.equal(got[0].sequences, want[0].sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(got[0].get(name), want[0].get(name), rtol=1e-4, atol=2e-5)
    assert set(got[0]) == set(want[0])


@pytest.fixture(scope="module")
def wanted(twin):
    """By name, what a call of CALLS gives under transformers' own loop; another prompt with seed 1."""
    return functools.cache(lambda name, seed=0: run(twin, seed=seed, **another(name, seed)))


def another(name, seed):
    ids = CALLS[name]["input_ids"]
    return {**CALLS[name], "input_ids": text(*ids.shape, seed=seed) if ids.shape[1] > 1 else ids + seed}


@pytest.mark.parametrize("name", ["greedy", "penalty sampled", "ngrams"])
def test_without_a_graph(llama, wanted, calls, name):
    same(run(llama, **CALLS[name]), wanted(name))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["padded", "sampled padded", "penalty sampled", "ngrams"])
def test_scores_and_logits(llama, twin, calls, name):
    arguments = {**CALLS[name], "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    same(run(llama, **arguments), run(twin, **arguments))
    assert len(calls) == 1


# --- recorded steps ---


def reads_late(monkeypatch, late=True):
    """As on a GPU, where the host reads whether to stop one token late."""
    decode = loop.decode
    monkeypatch.setattr(loop, "decode", lambda *args, **kwargs: decode(*args, **{**kwargs, "late": late}))


@pytest.fixture
def recorder(llama, monkeypatch):
    """Steps of llama are recorded."""
    return recorded(llama, monkeypatch)


def reads_nothing_itself(monkeypatch):
    """On the CPU a cache compares lengths at every token, which costs no waiting there."""
    check = SparseCache.check_consistent
    monkeypatch.setattr(SparseCache, "check_consistent", lambda cache, read: check(cache, False))


def recorded(model, monkeypatch):
    recorder, decoder = OpRecorder(), generate._decoders[model]
    reads_nothing_itself(monkeypatch)
    monkeypatch.setattr(decoder, "runner", lambda function, failed: Recorded(function, recorder, failed))
    monkeypatch.setattr(decoder, "caches", KeptCaches())
    return recorder


# those whose processors look at the tokens so far
AFTERWARDS = {"eta", "top_h", "ngrams", "bad words", "bias", "decay", "allowed", "watermark", "guided"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CALLS)
def test_a_step_can_be_recorded(llama, wanted, recorder, calls, name):
    """A step warms up, the rest are replayed, and the tokens, the stream and the random numbers after it are transformers'."""
    got = run(llama, **CALLS[name])
    same(got, wanted(name))
    steps = got[0].shape[1] - CALLS[name]["input_ids"].shape[1] - 1
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (1, 1, steps - 1) and steps > 3
    assert len(calls) == 1


def test_reading_cannot_be_recorded():
    with pytest.raises(HostRead):
        OpRecorder().record(lambda: torch.ones(1).item())


KEPT = ["greedy", "padded", "sampled padded", "returned sequences", "penalty sampled", "suppressed", "ngrams", "forced begin"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, late", [(name, True) for name in KEPT] + [("penalty sampled", False)])
def test_graphs_are_kept_between_calls(llama, wanted, recorder, monkeypatch, name, late):
    """A second call of the same kind, with another prompt, replays from its first step on; read late, it leaves no trace either."""
    reads_late(monkeypatch, late)
    for seed in range(2):
        same(run(llama, seed=seed, **another(name, seed)), wanted(name, seed))
        assert (recorder.warmed, recorder.recorded) == (1, 1)


def test_a_step_that_compiles_is_followed_by_one_that_does_not(monkeypatch):
    """What is recorded has been run as it is before."""
    compiled = iter([0, 1, 1, 1, 5, 6, 6, 7])  # before and after each step
    monkeypatch.setattr(runner.compat, "compiled_graphs", lambda: next(compiled))
    recorder = OpRecorder()
    step = Recorded(lambda: None, recorder)
    for _ in range(4):
        step()
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2, 1, 2)
    step.forget()
    for _ in range(4):
        step()
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (4, 2, 4), "no more than two, whatever other threads compile"


# --- what ends a generation ---


def tokenizer():
    words = {**{f"w{i}": i for i in range(VOCAB - 1)}, "[UNK]": VOCAB - 1}
    words["abcdef"] = words.pop("w126")  # what StopStringCriteria puts before each token
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("late", [False, True])
def test_stop_strings(llama, twin, recorder, calls, monkeypatch, late):
    reads_late(monkeypatch, late)
    free = run(twin, **PADDED, eos_token_id=None)[0]
    for row in range(3):  # each row's fifth token ends it, and after the last one all have ended
        stops = {"stop_strings": [f"w{free[r, 24]}" for r in range(row + 1)], "tokenizer": tokenizer()}
        for eos in (None, 2):
            arguments = {**PADDED, **stops, "eos_token_id": eos}
            got = run(llama, **arguments)
            same(got, run(twin, **arguments))
    assert got[0].shape[1] < free.shape[1] and len(calls) == 6
    assert recorder.recorded == 2  # with and without an end token


class Clock(Recorder):
    """Time that goes on by a second with every token that is streamed."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.now)

    def put(self, value):
        super().put(value)
        self.now += 1


def test_max_time(llama, twin, calls, monkeypatch):
    found = []
    for model in (llama, twin):
        with monkeypatch.context() as patch:
            found.append(model.generate(**PADDED, max_time=4.5, max_new_tokens=NEW, do_sample=False, streamer=Clock(patch)))
    assert torch.equal(*found) and found[0].shape[1] == 20 + 6
    assert len(calls) == 1


class Seventh(StoppingCriteria):
    """Stops when the last score's favourite is divisible by seven; counts how often it was asked, and keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append((input_ids.clone(), len(scores)))
        return scores[-1].argmax(-1) % 7 == 0


class InPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        assert input_ids.is_contiguous()
        scores[:, input_ids[0, -1].item()] += 5
        return scores


def test_criteria_and_processors_of_users(llama, twin, recorder, calls, monkeypatch):
    """They are asked as often as by transformers, and shown the same, even where the host could read late."""
    reads_late(monkeypatch)
    found = []
    for model in (llama, twin):
        criterion = Seventh()
        own = {"stopping_criteria": StoppingCriteriaList([criterion]), "logits_processor": LogitsProcessorList([InPlace()])}
        kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        found.append((run(model, **PADDED, **own, **kept), criterion.shown))
    same(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert len(calls) == 1 and recorder.recorded == 1


def test_a_distribution_that_is_none_is_an_error(llama, recorder, monkeypatch):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + (torch.nan if input_ids.shape[1] == 26 else 0)

    for late in (False, True):
        reads_late(monkeypatch, late)
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            run(llama, **PADDED, do_sample=True, logits_processor=LogitsProcessorList([Broken()]))
    assert torch.equal(run(llama, **PADDED)[0], run(llama, **PADDED)[0])


# --- caches ---


CACHES = {
    "full": lambda model: SparseCache(model.config, "full"),
    "full, small": lambda model: SparseCache(model.config, "full", 8),
    "streaming_llm": lambda model: SparseCache(model.config, budget=12),
    "snapkv": lambda model: SparseCache(model.config, "snapkv", 14, window=4),
}


@pytest.mark.parametrize("name, sample", [("full", False), ("full, small", True), ("streaming_llm", True), ("snapkv", False)])
def test_a_second_turn_over_a_cache_of_the_users(llama, twin, recorder, calls, monkeypatch, name, sample):
    """What the first turn leaves in the cache is what transformers' loop leaves, although the host may read late."""
    reads_late(monkeypatch)
    cache, other = CACHES[name](llama), CACHES[name](twin)
    ids = text(2, 20)
    for turn in range(2):
        end = [2, 11, 30, 31, 32, 33, 59, 60, 61, 62, 63, 64, 65]
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": sample, "eos_token_id": end}
        got, want = run(llama, seed=turn, **arguments, **holding(cache)), run(twin, seed=turn, **arguments, **holding(other))
        same(got, want)
        assert cache.get_seq_length() == other.get_seq_length()
        ids = torch.cat([got[0], text(2, 5, seed=turn + 7)], 1)
    assert len(calls) == 2 and recorder.recorded >= 1
    torch.testing.assert_close(cache.layers[1].positions[:, :, :12], other.layers[1].positions[:, :, :12])


GOING_ON = [
    ("full", "padded"),
    ("full", "sampled padded"),
    ("snapkv", "sampled"),
    ("full", "ngrams"),
    ("full", "suppressed"),
    ("static", "padded"),
]


@pytest.mark.parametrize("name, call", GOING_ON)
def test_a_prompt_that_lacks_one_token_is_a_step(llama, twin, recorder, monkeypatch, name, call):
    """A call leaves its last token out of the cache. One that goes on from there reads it as any other token, by what was recorded."""
    reads_late(monkeypatch)
    prefilled, prefill = [], GenerationMixin._prefill
    monkeypatch.setattr(
        GenerationMixin, "_prefill", lambda model, *args, **given: prefilled.append(model) or prefill(model, *args, **given)
    )
    end = {"eos_token_id": [120], "max_new_tokens": 6}
    make = lambda model: StaticCache(config=model.config, max_cache_len=60) if name == "static" else CACHES[name](model)
    arguments, results = CALLS[call], []
    for model in (llama, twin):
        given = holding(make(model))
        first = run(model, **arguments, **end, **given)
        more = torch.ones(first[0].shape[0], first[0].shape[1] - 20, dtype=torch.long)
        mask = torch.cat([arguments.get("attention_mask", torch.ones(first[0].shape[0], 20, dtype=torch.long)), more], 1)
        second = run(model, seed=1, **(arguments | {"input_ids": first[0], "attention_mask": mask}), **end, **given)
        results.append((first, second))
    for got, want in zip(*results, strict=True):
        same(got, want)
    assert prefilled.count(llama) == (2 if "penalty" in call else 1) and prefilled.count(twin) == 2
    assert recorder.recorded == (2 if call == "suppressed" else 1)  # what is suppressed at first names the prompt's length


@pytest.mark.parametrize("ends", [False, True])
def test_a_row_that_ends_with_padding_is_a_prompt(llama, twin, recorder, ends):
    """Its last column is no token: it is not read as one."""
    results = []
    for model in (llama, twin):
        given = holding(SparseCache(model.config, "full", 64))
        first = run(model, **PADDED, max_new_tokens=4, eos_token_id=None, **given)
        mask = torch.cat([PADDED["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        mask[1, -1] = not ends
        results.append(run(model, input_ids=first[0], attention_mask=mask, max_new_tokens=4, **given))
    same(*results)


@torch.no_grad()
def test_a_cache_that_is_returned_can_go_on(llama, twin, recorder, monkeypatch):
    reads_late(monkeypatch)
    outputs = [run(model, **PADDED, return_dict_in_generate=True)[0] for model in (llama, twin)]
    caches = [output[compat.CACHE_NAME] for output in outputs]
    assert isinstance(caches[0], SparseCache) and caches[0].get_seq_length() == caches[1].get_seq_length()
    mask = torch.cat([PADDED["attention_mask"], torch.ones(3, outputs[0].sequences.shape[1] - 20 + 4, dtype=torch.long)], 1)
    more = [
        run(model, input_ids=torch.cat([output.sequences, text(3, 4, seed=3)], 1), attention_mask=mask, **holding(cache))
        for model, output, cache in zip((llama, twin), outputs, caches)
    ]
    same(*more)
    assert caches[0] is not recorder


def test_a_cache_grows_while_it_is_used(llama, twin, recorder, monkeypatch):
    monkeypatch.setattr(loop, "_ROOM", 4)
    monkeypatch.setattr(kept_caches, "_rounded", lambda tokens: tokens)
    arguments = {"input_ids": text(1, 60), "max_new_tokens": 75, "eos_token_id": None}
    want = run(twin, **arguments)
    for _ in range(2):
        same(run(llama, **arguments), want)
    assert recorder.recorded == 2  # with room for 128 and for more, which the second call finds


class Adapter(torch.nn.Module):
    """As adapters are: which of them act, and how much, stands in attributes of all sorts."""

    def __init__(self, base):
        super().__init__()
        self.base, self.factors, self.active, self.shift = base, {"a": 1.0, "b": -2.0}, ["a"], torch.zeros(())
        self.nested = {"by": ([torch.ones(())],)}

    def forward(self, rows):
        return sum(self.base(rows) * self.factors[name] for name in self.active) * self.nested["by"][0][0] + self.shift


def adapters(change):
    return lambda model: [change(part) for part in model.modules() if isinstance(part, Adapter)]


def adapted(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)


CHANGES = {
    "another weight": [lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(-m.lm_head.weight.detach()))],
    "attributes": [lambda m: setattr(m.model.layers[1].self_attn, "scaling", 3.0)],
    "functions": [lambda m, by=by: setattr(m.model.layers[1].mlp, "forward", lambda rows: rows * by) for by in (1.0, -1.5, 2.0)],
    "containers": [
        adapters(lambda part: setattr(part, "active", ["b"])),
        adapters(lambda part: part.active.append("a")),
        adapters(lambda part: part.factors.update(a=3.0)),
    ],
    "tensors": [
        adapters(lambda part: setattr(part, "shift", torch.full((), 0.5))),
        adapters(lambda part: part.nested["by"][0].__setitem__(0, torch.full((), -1.5))),
    ],
    "the configuration": [lambda m: setattr(m.config, "note", {"sizes": [1, 2]}), lambda m: m.config.note["sizes"].append(3)],
}


FEW = {**PADDED, "eos_token_id": None, "max_new_tokens": 5}


@pytest.mark.parametrize("name", CHANGES)
def test_graphs_of_a_changed_model_are_not_used(llama, twin, recorder, name):
    """All that a recorded step would not see."""
    model, other = installed(build("llama")), build("llama")
    generate._decoders[model].runner = generate._decoders[llama].runner
    for change in (adapted, *CHANGES[name]):
        change(model), change(other)
        gc.collect()
        want = run(other, **FEW)
        for _ in range(2):
            same(run(model, **FEW), want)
    assert recorder.recorded == 1 + len(CHANGES[name])


@pytest.mark.parametrize("where", ["", "model", "lm_head", "model.layers.1", "model.layers.0.mlp"])
def test_hooks_are_called_at_every_token(llama, recorder, where):
    """One after the other, each of which may get the place of the last one; what they compute with may change from token to token."""

    def outcome(model, by):
        seen = []

        def hook(module, args):
            seen.append(args[0].shape if args else None)
            return (args[0] * by ** len(seen), *args[1:]) if where not in ("", "model") else None

        handle = model.get_submodule(where).register_forward_pre_hook(hook)
        result = run(model, **FEW)
        handle.remove()
        return result, seen

    model, other = installed(build("llama")), build("llama")
    generate._decoders[model].runner = generate._decoders[llama].runner
    same(run(model, **FEW), run(other, **FEW))
    recorded_before = recorder.recorded
    for by in (1.5, 1.2, 0.7):
        got, want = outcome(model, by), outcome(other, by)
        same(got[0], want[0])
        assert len(got[1]) == len(want[1]) == FEW["max_new_tokens"]
    same(run(model, **FEW), run(other, **FEW))
    assert recorded_before == 1 and recorder.recorded == 2


def doubled(module, args, result):
    return result * 2


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_which_hooks_a_graph_leaves_out():
    model = build("llama")
    assert hooked(model) == ""
    model(text(1, 3), output_hidden_states=True)  # after which transformers leaves hooks there
    torch.nn.utils.spectral_norm(model.lm_head)  # one of torch's own
    assert any(part._forward_hooks for part in model.modules()) and hooked(model) == ""
    handle = model.model.layers[1].mlp.register_forward_hook(functools.partial(doubled))
    assert hooked(model) == "model.layers.1.mlp has hooks"
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(doubled)
    assert hooked(model) == "all modules have hooks"
    handle.remove()
    assert hooked(model) == ""


def test_threads_have_caches_of_their_own(llama, twin, recorder):
    """Requests of several kinds at once over one model, with graphs that are recorded, kept and replayed."""
    jobs = [CALLS[name] for name in ("greedy", "batch", "padded", "penalty")]
    want = [run(twin, **job)[0] for job in jobs] * 2
    jobs = jobs * 2
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: run(llama, streamer=False, **job)[0], jobs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["greedy", "padded", "penalty sampled"])
def test_static_caches(llama, twin, recorder, calls, monkeypatch, name):
    """Of generate() and of users, who may use one again and go on with it. The tokens are those of a dynamic cache."""
    reads_late(monkeypatch)
    want = run(twin, **CALLS[name])
    same(run(llama, **CALLS[name], cache_implementation="static"), want)
    cache = StaticCache(config=llama.config, max_cache_len=50)
    for _ in range(2):
        same(run(llama, **CALLS[name], **holding(cache)), want)
        length = int(cache.get_seq_length())
        cache.reset()
    assert length == want[0].shape[1] - 1
    assert len(calls) == 3 and recorder.recorded == 2


def test_a_second_turn_over_a_static_cache(llama, twin, recorder, calls):
    cache, other = StaticCache(config=llama.config, max_cache_len=80), DynamicCache(config=twin.config)
    ids, mask = PADDED["input_ids"], PADDED["attention_mask"]
    for turn in range(3):
        got = run(llama, input_ids=ids, attention_mask=mask, **holding(cache))
        same(got, run(twin, input_ids=ids, attention_mask=mask, **holding(other)))
        ids = torch.cat([got[0], text(3, 3, seed=turn)], 1)
        mask = torch.cat([mask, torch.ones(3, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    assert len(calls) == 3 and recorder.recorded == 1


# --- what transformers' own loop serves ---


ELSEWHERE = {
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 2},
    "attentions": {"output_hidden_states": True, "return_dict_in_generate": True},
    "no cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "a dynamic cache": "dynamic cache",
    "custom": {"custom_generate": lambda model, *args, **kwargs: GenerationMixin._sample(model, *args, **kwargs)},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_the_loop_does_not_know(llama, twin, calls, name):
    ids = text(1, 12).repeat(1, 2)
    found = []
    for model in (llama, twin):
        given = holding(DynamicCache(config=model.config)) if isinstance(ELSEWHERE[name], str) else ELSEWHERE[name]
        found.append(run(model, input_ids=ids, streamer=False, **given))
    assert not calls
    same(*found)
    if name == "attentions":
        torch.testing.assert_close(found[0][0].hidden_states, found[1][0].hidden_states)
        assert isinstance(found[0][0][compat.CACHE_NAME], DynamicCache)


def test_embeddings_for_a_prompt(llama, twin, calls):
    with torch.no_grad():
        embeddings = twin.get_input_embeddings()(text(2, 15)) * 1.5
    for more in ({}, {"input_ids": text(2, 15)}, {"repetition_penalty": 1.5}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the penalty does not see the prompt
            same(run(llama, inputs_embeds=embeddings, streamer=False, **more), run(twin, inputs_embeds=embeddings, streamer=False, **more))
    assert len(calls) == 3


def test_copies_of_a_model_are_as_they_would_be(llama, twin, calls):
    want = run(twin, **PADDED)
    other = copy.deepcopy(llama)
    assert other.generate.__self__ is other
    same(run(other, **PADDED), want)
    loaded = pickle.loads(pickle.dumps(installed(build("llama"))))
    assert loaded.generate.__func__ is GenerationMixin.generate
    same(run(loaded, **PADDED), want)
    assert not calls
    same(run(llama, **PADDED), want)
    assert len(calls) == 1


# --- families, compiled ---


SERVED = ("llama", "qwen3", "mistral_window", "gemma", "gemma2", "gemma3", "gpt_neox")


@pytest.mark.parametrize("family", [*SERVED, "phi3", "bloom", "falcon_alibi", "deepseek_v3"])
def test_families(family, monkeypatch, calls):
    """Those that a SparseCache serves take the loop, and one token of them can be recorded; the others decode as before."""
    model, other = (build(family, "eager" if family in EAGER_ONLY else "sdpa") for _ in range(2))
    recorder = recorded(installed(model), monkeypatch)
    for arguments in (PADDED, {**PLAIN, **SAMPLED}):
        same(run(model, **arguments, eos_token_id=[2, 11]), run(other, **arguments, eos_token_id=[2, 11]))
    assert (len(calls), recorder.recorded) == ((2, 2) if family in SERVED else (0, 0))


@pytest.mark.parametrize("family", ["mistral_window", "gemma3", "llama"])
def test_padding_between_tokens_of_a_window(family, calls):
    """Caches of transformers count it as part of the window, on the left of all tokens too where that makes no difference."""
    model, other = installed(build(family)), build(family)
    for start, stop in ((0, 5), (12, 15), (17, 20)):
        mask = torch.ones(2, 20, dtype=torch.int64)
        mask[1, start:stop] = 0
        given = {
            "input_ids": text(2, 20),
            "attention_mask": mask,
            "return_dict_in_generate": True,
            "output_logits": True,
            "eos_token_id": None,
        }
        same(run(model, **given), run(other, **given))
    assert len(calls) == (3 if family == "llama" else 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.samples(1)
def test_compiled(family, calls, monkeypatch):
    """What Python does around compiled code reads nothing from the device, so that a graph can hold it."""
    model, other = build(family, layers=1), build(family, layers=1)
    torch._dynamo.reset()
    sparsify.compile(model, lower="eager", strict=True, progress=False, kernels="reference")  # what a CPU may be asked a device may not
    reads_nothing_itself(monkeypatch)
    runners = []
    decoder = generate._decoders[model]
    monkeypatch.setattr(decoder, "runner", lambda function, failed: runners.append(NoReads(function)) or runners[-1])
    try:
        with sparsify.api.collect_plans() as plans:
            for arguments in (PADDED, {**PADDED, "input_ids": text(3, 20, seed=9)}):
                same(run(model, **arguments, eos_token_id=None), run(other, **arguments, eos_token_id=None))
        assert sum(d.method == "kv_evict" for plan in plans for d in plan.decisions) == 1 and len(calls) == 2
        assert [runner.unread for runner in runners] == [NEW - 3, NEW - 3]
    finally:
        torch._dynamo.reset()


def test_a_method_of_a_module_s_own_class_is_no_hook_of_torch(llama):
    class Counting(torch.nn.Module):
        def forward(self, *given):
            return None

    with_hook = copy.deepcopy(llama)
    with_hook.model.layers[1].mlp.register_forward_hook(Counting().__call__)
    assert hooked(with_hook) == "model.layers.1.mlp has hooks"


def test_a_new_prompt_s_positions_leave_a_step_as_it_is(llama):
    """Models that see write `rope_deltas` at every prompt; other tensors that are replaced may be read by a recorded step."""
    model = copy.deepcopy(llama)
    model.model.rope_deltas, model.model.bias = torch.zeros(1, 1), torch.zeros(1, 1)
    before = model_state(model)
    kept = model.model.rope_deltas, model.model.bias
    model.model.rope_deltas = torch.zeros(1, 1)
    assert model_state(model) == before
    model.model.bias = torch.zeros(1, 1)
    assert model_state(model) != before and len(kept) == 2
