"""Self-speculation: tokens drafted over pages of an exact cache are those of decoding without drafts, or drawn from its distribution."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import sparsify
from sparsify import Pages, SparseCache
from sparsify.costs import profile
from sparsify.costs.device import Device
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.generation import generate
from sparsify.generation.caches.drafting import MOST
from sparsify.generation.caches.running_call import CallState
from sparsify.generation.decoding import draft_lengths, loop
from sparsify.generation.decoding.draft_lengths import LENGTHS, DraftLength, Line, Seconds, predicted
from sparsify.generation.decoding.drafts import Drafts
from sparsify.generation.decoding.runner import Direct, Recorded
from sparsify.generation.decoding.step import Step
from sparsify.generation.decoding.step_caches import SparseStep
from tests.support.cache_reference import left_padded, text, through
from tests.support.harness import holding
from tests.support.op_recorder import OpRecorder
from tests.support.tiny_models import build

NEW = 24
# so little that many drafts are wrong, and so much that many are right
FEW = Pages(size=8, count=1, sinks=1, recent=4)
PLAIN = {"input_ids": text(1, 60)}
PADDED = {"input_ids": text(3, 60), "attention_mask": left_padded([60, 41, 50])}


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    assert generate.install(model, shown=False) == ""
    return model


@pytest.fixture(scope="module")
def twin():
    """The same model under transformers' own loop."""
    return build("llama")


def drafting(model, tokens=None, pages=FEW, budget=128, **given):
    return SparseCache(model.config, "full", budget, draft=pages, draft_tokens=tokens, **given)


def run(model, cache=None, **arguments):
    held = {} if cache is None else holding(cache)
    torch.manual_seed(0)
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **arguments, **held})


CALLS = {
    "greedy": PLAIN,
    "batch": {"input_ids": text(2, 60)},
    "padded": PADDED,
    "ends": {**PADDED, "eos_token_id": [2, 11, 30, 31, 32, 33]},
    "penalty": {**PADDED, "repetition_penalty": 1.7},
    "shorter than": {**PADDED, "min_new_tokens": 9, "eos_token_id": list(range(3, 100))},
    "forced end": {**PLAIN, "forced_eos_token_id": 5, "eos_token_id": 5},
}


@pytest.mark.samples(5)
@pytest.mark.parametrize("tokens", [None, 1, 5])
@pytest.mark.parametrize("name", CALLS)
def test_greedy_tokens_are_those_without_drafts(llama, twin, name, tokens):
    cache = drafting(llama, tokens)
    want = run(twin, **CALLS[name])
    assert torch.equal(run(llama, cache, **CALLS[name]), want)
    assert cache.drafted > 0
    assert cache.get_seq_length() == want.shape[1] - 1
    if name == "greedy":
        assert 0 < cache.drafts_kept < cache.drafted, "both kinds of drafts were there"


def test_drafts_and_verifications_can_be_recorded(llama, twin, monkeypatch):
    """As a CUDA graph would hold them: nothing is read from the device in between."""
    recorder = OpRecorder()
    monkeypatch.setattr(generate._decoders[llama], "runner", lambda function, failed: Recorded(function, recorder, failed))
    check = SparseCache.check_consistent
    monkeypatch.setattr(SparseCache, "check_consistent", lambda cache, read: check(cache, False))
    cache = drafting(llama, 2)
    for seed in range(2):
        ids = text(1, 60, seed=seed)
        cache.reset()
        assert torch.equal(run(llama, cache, input_ids=ids), run(twin, input_ids=ids))
        # a draft's step and a verification of two; those of one, at the end of a call, may come only once
        assert 2 <= recorder.recorded <= recorder.warmed <= 4 and recorder.replayed > 10


def test_recorded_verifications_of_several_lengths(llama, twin, monkeypatch):
    """Each length's graph has results of its own, whatever was run last."""
    recorder = OpRecorder()
    monkeypatch.setattr(generate._decoders[llama], "runner", lambda function, failed: Recorded(function, recorder, failed))
    check = SparseCache.check_consistent
    monkeypatch.setattr(SparseCache, "check_consistent", lambda cache, read: check(cache, False))
    lengths = itertools.cycle([1, 3, 2])
    monkeypatch.setattr(DraftLength, "choose", lambda self, stored, most: min(next(lengths), most))
    arguments = {**PLAIN, "max_new_tokens": 40, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    got, want = run(llama, drafting(llama), **arguments), run(twin, **arguments)
    assert recorder.recorded == 4 and recorder.replayed > 20
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5)


def test_a_step_that_begins_a_call_is_recorded(llama, twin, monkeypatch):
    """Between drafts few steps are plain ones, so that the recorded one may be a call's first, of which the host knows no lengths yet."""
    recorder = OpRecorder()
    monkeypatch.setattr(generate._decoders[llama], "runner", lambda function, failed: Recorded(function, recorder, failed))
    check = SparseCache.check_consistent
    monkeypatch.setattr(SparseCache, "check_consistent", lambda cache, read: check(cache, False))
    cache = drafting(llama, 6, budget=160)
    ids = text(1, 60)
    for _ in range(4):
        want = run(twin, input_ids=ids, max_new_tokens=7)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="sparsify decodes without")
            assert torch.equal(run(llama, cache, input_ids=ids, max_new_tokens=7), want)
        ids = want
    assert recorder.replayed > 2


def test_scores_streams_and_what_a_call_ends_by(llama, twin):
    arguments = {**PADDED, "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    got, want = run(llama, drafting(llama, 4), **arguments), run(twin, **arguments)
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == NEW
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5)
    free = run(twin, **PLAIN)
    for at in (61, 63, 66):  # ends within a draft, wherever that is
        end = int(free[0, at])
        cache = drafting(llama, 4)
        got = run(llama, cache, **PLAIN, eos_token_id=end)
        assert torch.equal(got, run(twin, **PLAIN, eos_token_id=end))
        assert cache.get_seq_length() == got.shape[1] - 1


def test_turns_go_on_from_where_a_draft_was_cut(llama, twin):
    """What the cache holds after drafts is what it holds without them."""
    free = run(twin, **PLAIN)
    cache = drafting(llama, 6)
    first = run(llama, cache, **PLAIN, eos_token_id=int(free[0, 67]))
    turn = torch.cat((first, text(1, 9, seed=7)), 1)
    assert torch.equal(run(llama, cache, input_ids=turn), run(twin, input_ids=turn))
    with torch.no_grad():
        want = SparseCache(llama.config, "full", 128, read=Pages(size=8, share=1.0))
        held = int(cache.get_seq_length())
        whole = run(twin, input_ids=turn)
        through(llama, want, whole[:, :held], [held])
    for got, plain in zip(cache.layers, want.layers, strict=True):
        assert torch.equal(got.counts, plain.counts) and torch.equal(got.seen, plain.seen)
        assert torch.equal(got.positions[:, :, :held], plain.positions[:, :, :held]) and int(got.positions[:, :, held:].max()) == -1
        torch.testing.assert_close(got.keys[:, :, :held], plain.keys[:, :, :held], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(got.values[:, :, :held], plain.values[:, :, :held], rtol=1e-4, atol=2e-5)
        whole_pages = held // 8
        torch.testing.assert_close(got.bounds[:, :, :whole_pages], plain.bounds[:, :, :whole_pages], rtol=1e-4, atol=2e-5)


def test_a_cache_grows_between_drafts(llama, twin, monkeypatch):
    monkeypatch.setattr(loop, "_ROOM", 2)  # and half of the prompt
    want = run(twin, input_ids=text(1, 8), max_new_tokens=70)
    cache = drafting(llama, 5, budget=8)
    assert torch.equal(run(llama, cache, input_ids=text(1, 8), max_new_tokens=70), want)
    assert cache.layers[0].keys.shape[2] == 128


@pytest.mark.slow
def test_a_compiled_model_drafts(twin):
    model = build("llama")
    torch._dynamo.reset()
    sparsify.compile(model, strict=True, lower="eager", min_length=0, progress=False, compile_ahead=False)
    cache = drafting(model, 3)
    with sparsify.api.collect_plans() as plans:
        assert torch.equal(run(model, cache, **PLAIN, max_new_tokens=10), run(twin, **PLAIN, max_new_tokens=10))
    assert cache.drafted > 0 and "kv_evict" in {d.method for plan in plans for d in plan.decisions}


def test_files_and_copies_draft_too(llama, twin, tmp_path):
    with torch.no_grad():
        cache = drafting(llama, 3)
        through(llama, cache, text(1, 60)[:, :59], [59])
    cache.save(tmp_path / "prompt.safetensors", llama)
    loaded = SparseCache.load(tmp_path / "prompt.safetensors", llama)
    assert (loaded.draft, loaded.draft_tokens) == (FEW, 3)
    for other in (loaded, cache.fork()):
        assert torch.equal(run(llama, other, **PLAIN), run(twin, **PLAIN))
        assert other.drafted > 0
    assert cache.drafted == 0


# --- sampling ---


class Chains:
    """A cache and a model at once: logits that depend on a token and the one before alone, of a draft otherwise than exactly."""

    draft_tokens = None

    def __init__(self, vocabulary, rows):
        generator = torch.Generator().manual_seed(5)
        self.exact, self.draft = (torch.randn(vocabulary, vocabulary, generator=generator) * 1.5 for _ in range(2))
        self.reads_draft, self.stored, self.draft_rounds, self.drafted, self.drafts_kept = False, 0, 0, 0, 0
        self.call = CallState()

    def drafting(self):
        chains = self

        class Reading:
            def __enter__(self):
                chains.reads_draft = True

            def __exit__(self, *why):
                chains.reads_draft = False

        return Reading()

    def forward(self, input_ids, position_ids):
        assert position_ids.shape[-1] == input_ids.shape[1]
        self.stored += input_ids.shape[1]
        return (self.draft if self.reads_draft else self.exact)[input_ids]

    def take_back(self, tokens, most):
        assert 0 <= int(tokens) <= most
        self.stored -= int(tokens)

    def recount(self, tokens):
        self.host = tokens


@pytest.mark.slow
def test_sampled_tokens_have_the_exact_distribution():
    """The pairs that follow a token, of two rows that keep the same number of drafts, against the exact chain's: chi-squared."""
    rows, vocabulary, rounds = 2, 4, 2500
    torch.manual_seed(3)
    chains = Chains(vocabulary, rows)
    step = Step(lambda **inputs: None, rows, 8, torch.zeros(rows, 1, dtype=torch.long), parts=(), sample=True, eos=(), pad=None)
    cache = SparseStep(chains)
    drafts = Drafts(step, chains.forward, cache, Direct, Seconds(Line(1, 0), {}))
    counts = torch.zeros(vocabulary, vocabulary)
    for _ in range(rounds):
        step.token.fill_(0)
        tokens = torch.zeros(rows, 0, dtype=torch.long)
        while tokens.shape[1] < 2:
            found = drafts.round(2, chains.stored, vocabulary)
            tokens = torch.cat((tokens, drafts.found[:, :found]), 1)
            step.token.copy_(tokens[:, -1:])
            assert chains.host == chains.stored
        for row in tokens.tolist():
            counts[row[0], row[1]] += 1
    assert 0.2 < chains.drafts_kept / chains.drafted < 0.9
    first = chains.exact[0].softmax(-1)
    want = first[:, None] * chains.exact.softmax(-1) * rounds * rows
    statistic = float(((counts - want) ** 2 / want).sum())
    assert statistic < 37.7, f"chi-squared of 15 degrees of freedom, 0.1 %: {statistic}"
    drafted = chains.draft[0].softmax(-1)[:, None] * chains.draft.softmax(-1) * rounds * rows
    assert float(((counts - drafted) ** 2 / drafted).sum()) > 500, "the test tells the two chains apart"


def test_sampling_keeps_all_drafts_over_all_pages(llama):
    """Where the draft's distribution is the exact one, every token is accepted."""
    cache = drafting(llama, 4, pages=Pages(size=8, share=1.0))
    got = run(llama, cache, **PLAIN, do_sample=True, temperature=0.8, top_k=20)
    assert got.shape[1] == 60 + NEW
    assert cache.drafts_kept >= cache.drafted - 4, "but for rounding"
    again = run(llama, drafting(llama, 4, pages=Pages(size=8, share=1.0)), **PLAIN, do_sample=True, temperature=0.8, top_k=20)
    assert torch.equal(got, again), "a seed gives the same tokens again"


def test_a_distribution_that_is_none_is_an_error(llama):
    with torch.no_grad():
        broken = build("llama")
        assert generate.install(broken, shown=False) == ""
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        run(broken, drafting(broken, 2), **PLAIN, do_sample=True)


# --- how many ---


def seconds(draft, exact):
    """Verifying is as dear as an exact token."""
    return Seconds(Line(draft, 0), dict.fromkeys(range(MOST + 1), Line(exact, 0)))


def test_how_many_are_drafted():
    cheap = DraftLength(seconds(0.01, 1.0))
    for _ in range(40):
        cheap.learn(8, 8)
    assert cheap.acceptance > 0.98 and cheap.choose(1000, 99) == MOST and cheap.choose(1000, 5) == 4 and cheap.choose(1000, 0) == 0
    for _ in range(200):
        cheap.learn(8, 0)
    assert cheap.acceptance < 0.05 and cheap.choose(1000, 99) in (0, 1)
    dear = DraftLength(seconds(1.0, 1.0))
    chosen = [dear.choose(1000, 99) for _ in range(100)]
    assert sum(chosen) == 3 and set(chosen) == {0, 1}, "now and then one, to see whether it pays by now"
    assert DraftLength(seconds(1.0, 1.0), fixed=5).choose(1000, 99) == 5
    assert DraftLength(seconds(1.0, 1.0), fixed=5).choose(1000, 3) == 3
    # by hand: of 3 drafts at a share of a half 1 + 1/2 + 1/4 + 1/8 tokens in 3 * 0.1 + 1
    half = DraftLength(seconds(0.1, 1.0))
    half.tried, half.kept = 2.0, 1.0
    assert half.tokens_a_second(3, 0) == pytest.approx(1.875 / 1.3)
    assert half.choose(0, 99) == max(LENGTHS, key=lambda n: (2 - 0.5**n) / (0.1 * n + 1))


def test_predicted_seconds_of_a_long_cache_favour_drafts(llama, monkeypatch):
    device = Device.from_profile("cuda", profile.for_capability((9, 0)))
    monkeypatch.setattr(draft_lengths.costs_device, "describe", lambda _: device)
    cache = drafting(llama, pages=Pages())
    found = predicted(llama, cache, 1)
    assert found.draft.slope < 0.3 * found.verify[0].slope
    for drafts in range(MOST):
        for tokens in (20000, 500000):
            assert 0 < found.verify[drafts].at(tokens) <= found.verify[drafts + 1].at(tokens)
    short, long = (DraftLength(found).choose(tokens, 99) for tokens in (1000, 4_000_000))
    assert short <= long and long >= 6


# --- what is refused ---


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"policy": "snapkv", "budget": 64}, UnsupportedError, "snapkv evicts"),
        ({"policy": "streaming_llm", "budget": 64}, UnsupportedError, "streaming_llm evicts"),
        ({"dtype": "fp8"}, UnsupportedError, "fp8 codes of a group"),
        ({"read": "pages"}, ConfigError, "verified over everything"),
        ({"draft": "window"}, ConfigError, "must be"),
        ({"draft_tokens": 0}, ConfigError, "1 to 15"),
        ({"draft_tokens": MOST + 1}, ConfigError, "1 to 15"),
        ({"draft": None, "draft_tokens": 3}, ConfigError, "no `draft`"),
    ],
    ids=str,
)
def test_what_is_refused(llama, given, error, match):
    with pytest.raises(error, match=match):
        SparseCache(llama.config, **{"policy": "full", "draft": "pages", **given})


def test_windows_of_the_model_are_refused():
    with pytest.raises(UnsupportedError, match="sliding window"):
        SparseCache(build("gemma3").config, "full", draft="pages")


def test_processors_that_look_at_tokens_leave_drafts_out(llama, twin, caplog):
    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + (input_ids[:, -1:] % 3)

    own = {"logits_processor": LogitsProcessorList([Own()])}
    cache = drafting(llama, 3)
    with caplog.at_level("INFO"):
        assert torch.equal(run(llama, cache, **PLAIN, **own), run(twin, **PLAIN, **own))
    assert cache.drafted == 0 and "looks at the tokens so far" in caplog.text
    # without sparsify's loop it is an exact cache
    plain = build("llama")
    cache = drafting(plain, 3)
    assert torch.equal(run(plain, cache, **PLAIN), run(twin, **PLAIN))
    assert cache.drafted == 0
