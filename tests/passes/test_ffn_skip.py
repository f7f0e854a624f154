"""ffn_skip on whole models: what it may not change, what it must leave out, and when."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from sparsify import api
from sparsify.backends.ffn import reference
from sparsify.ops import feed_forward
from sparsify.planning.plan import Plan
from tests.support.harness import compiled, holding, run, strict, visible_error
from tests.support.tiny_models import VOCAB, build

LAYERS = 4
FP32 = 2e-5
# the quick run has one with gates and norms on both sides, and one with neither
FAMILIES = ("gemma3", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "phi3", "gpt_neox", "olmo2", "falcon")))
NORMED = ("gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "llama", "phi3", "gpt_neox", "olmo2", "falcon")))


def skipping(**options) -> dict:
    """Skipping anywhere and from the first generated token on, unless a test says otherwise."""
    defaults = {"cold_first": 0, "cold_last": 0, "warmup": 0}
    return strict(passes=["ffn_skip"], ffn_skip={**defaults, **options})


@pytest.fixture(autouse=True)
def fresh_runs():
    feed_forward.forget_runs()


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(ids: torch.Tensor, count: int = 4):
    """Logits of a prompt and of `count` decode steps on given tokens."""

    def call(model):
        cache = DynamicCache(config=model.config)
        lengths = [ids.shape[1] - count] + [1] * count
        return torch.cat([model(input_ids=part, **holding(cache)).logits for part in ids.split(lengths, 1)], 1)

    return call


ONE_TOKEN = lambda model: model(input_ids=torch.tensor([[5]]), use_cache=False).logits


@contextlib.contextmanager
def observed():
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    observer = lambda before, after: seen.append((before.clone(), after.clone()))
    with feed_forward.observing(observer):
        yield seen


@contextlib.contextmanager
def without(model: torch.nn.Module, left_out: callable):
    """The model in eager mode, whose block of layer i gives 0 in the t-th decode step when left_out(i, t)."""
    blocks = [m for name, m in model.named_modules() if name.endswith(".mlp")]
    step = [-1]

    def hook(index):
        def act(module, inputs, output):
            decode = inputs[0].shape[-2] == 1 if inputs[0].dim() == 3 else False
            if decode and index == 0:
                step[0] += 1
            if not (decode and left_out(index, step[0])):
                return output
            return inputs[1] if len(inputs) > 1 else torch.zeros_like(output)  # BLOOM's block adds the residual itself

        return act

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield len(blocks)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_above_one_is_dense(family):
    model = build(family, layers=LAYERS)
    call = steps(prompt(2, 13))
    with torch.no_grad():
        want = call(model)
    got = run(model, call, skipping(threshold=1.5))
    assert got.rewritten("ffn_skip") == LAYERS * (got.graphs - 1)
    assert visible_error(got.value, want) < FP32
    if family == "gpt2":
        always_warming_up = run(model, call, skipping(threshold=-1.0, warmup=1 << 20))
        assert torch.equal(got.value, always_warming_up.value)
    if family == "llama":  # the reference repeats its roundings
        assert torch.equal(got.value, want)


@pytest.mark.parametrize("family", NORMED)
@pytest.mark.parametrize("skip", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_threshold_minus_one_leaves_out_the_blocks_after_each_computed_one(family, skip):
    model = build(family, layers=LAYERS)
    call = steps(prompt(2, 13))
    with torch.no_grad(), without(model, lambda layer, step: layer % (skip + 1) != 0) as blocks:
        want = call(model)
        assert blocks == LAYERS
    got = run(model, call, skipping(threshold=-1.0, skip=skip))
    assert visible_error(got.value, want) < FP32
    with torch.no_grad():
        assert visible_error(call(model), want) > 1e-3  # leaving blocks out matters


@pytest.mark.slow
def test_cold_blocks_are_never_left_out():
    model = build("llama", layers=6)
    call = steps(prompt(2, 13))
    with torch.no_grad(), without(model, lambda layer, step: layer == 3):
        want = call(model)
    got = run(model, call, skipping(threshold=-1.0, skip=9, cold_first=2, cold_last=2))
    assert visible_error(got.value, want) < FP32
    assert any("cold" in r for r in got.refusals())


@pytest.mark.slow
def test_real_similarity_decides_row_by_row():
    """Against a reference that reads the residual stream around each block of the eager model."""
    model = build("llama", layers=LAYERS, hidden_size=64)
    for layer in model.model.layers:  # weak blocks, so that similarities lie on both sides of the threshold
        layer.mlp.down_proj.weight.data *= 6.0
    ids = prompt(4, 13)
    threshold = 0.9
    counters: dict[str, torch.Tensor] = {}
    held: dict[int, torch.Tensor] = {}
    skipped = []

    def before(index):
        return lambda module, inputs: held.__setitem__(index, inputs[0])

    def after(index):
        def act(module, inputs, output):
            if output.shape[1] != 1:
                return output
            if index == 0:
                counters["n"] = torch.zeros(output.shape[0], dtype=torch.long)
            left = counters["n"]
            skip = left > 0
            skipped.append(skip.clone())
            out = torch.where(skip[:, None, None], 0, output)
            close = torch.cosine_similarity(held[index], held[index] + out, dim=-1)[:, 0] >= threshold
            counters["n"] = torch.where(skip, left - 1, torch.where(close, 2, 0))
            return out

        return act

    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(before(i)))
        handles.append(layer.mlp.register_forward_hook(after(i)))
    with torch.no_grad():
        want = steps(ids)(model)
    for handle in handles:
        handle.remove()
    share = torch.stack(skipped).float()
    assert 0 < share.mean() < 0.66 and (share.mean(1) % 1 > 0).any()  # rows of one batch differ
    with observed() as seen:
        got = run(model, steps(ids), skipping(threshold=threshold, skip=2))
    assert torch.equal(torch.stack([b > 0 for b, _ in seen]), torch.stack(skipped))
    assert visible_error(got.value, want) < FP32


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 9, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.samples(1)
def test_generate_stays_dense_for_the_first_tokens(cache, length):
    model = build("llama", layers=LAYERS)
    warmup, tokens = 3, 7
    inputs = {"input_ids": prompt(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    call = lambda m: m.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, cache_implementation=cache, eos_token_id=None
    )
    first = 0 if length > 1 else 1  # a prompt of one token is a decode step itself
    with torch.no_grad(), without(model, lambda layer, step: step >= warmup and layer % 2 == 1):
        want = call(model)
    with observed() as seen:
        got = run(model, call, skipping(threshold=-1.0, warmup=warmup))
    assert torch.equal(got.value, want)
    dense = [bool((before < 0).all()) for before, _ in seen[::LAYERS]]
    assert dense == [True] * warmup + [False] * (tokens - 1 + first - warmup)


@pytest.mark.slow
def test_left_padded_batches():
    model = build("llama", layers=LAYERS)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :7], mask[1, :2] = 0, 0
    inputs = {"input_ids": prompt(3, 12) * mask, "attention_mask": mask}
    call = lambda m: m.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad(), without(model, lambda layer, step: step >= 2 and layer % 2 == 1):
        want = call(model)
    assert torch.equal(run(model, call, skipping(threshold=-1.0, warmup=2)).value, want)


@pytest.mark.slow
def test_a_second_prompt_starts_anew_and_turns_stay_dense():
    model = build("llama", layers=2)
    options = skipping(threshold=-1.0, warmup=2)
    with torch.no_grad(), compiled(model, options), observed() as seen:
        for length in (9, 12):
            steps(prompt(1, length + 4, seed=length))(model)
        one, other = (DynamicCache(config=model.config) for _ in range(2))
        model(input_ids=prompt(1, 5), **holding(one))
        model(input_ids=prompt(1, 30), **holding(other))
        for step in range(4):
            for cache in (one, other):
                model(input_ids=prompt(1, 1, seed=step), **holding(cache))
    dense = [bool((before < 0).all()) for before, _ in seen[::2]]
    assert dense == [True, True, False, False] * 2 + [True] * 8


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["similarity", *(pytest.param(p, marks=pytest.mark.slow) for p in ("schedule", "static"))])
def test_a_prompt_that_ends_where_the_last_run_did_starts_anew(policy):
    """By their positions alone, its tokens would go on with the run before."""
    model = build("llama", layers=3)
    settings = {"policy": policy, "threshold": -1.0, "warmup": 2, "most": 1.0, "length": 2}
    options = (
        skipping(**settings)
        if policy != "static"
        else strict(passes=[], rules=[{"layers": "1", "method": "ffn_skip", "policy": policy, "warmup": 2}])
    )
    with torch.no_grad(), compiled(model, options), observed() as seen:
        for length in (5, 9):
            steps(prompt(1, length + 4, seed=length))(model)
    blocks = 1 if policy == "static" else 3
    dense = [bool((before < 0).all()) for before, _ in seen[::blocks]]
    assert dense == [True, True, False, False] * 2


@pytest.mark.slow
def test_own_calls_with_a_static_cache():
    model = build("llama", layers=LAYERS)
    ids = prompt(2, 14)

    def call(m):
        cache = StaticCache(config=m.config, max_cache_len=32)
        return torch.cat([m(input_ids=part, **holding(cache)).logits for part in ids.split([9, 1, 1, 1, 1, 1], 1)], 1)

    with torch.no_grad(), without(model, lambda layer, step: step >= 3 and layer % 2 == 1):
        want = call(model)
    assert visible_error(run(model, call, skipping(threshold=-1.0, warmup=3)).value, want) < FP32


@pytest.mark.slow
def test_a_schedule_leaves_out_lower_blocks_as_generation_goes_on():
    model = build("llama", layers=6)
    call = steps(prompt(2, 15), count=6)
    options = skipping(policy="schedule", most=0.75, length=4, cold_first=1, cold_last=1)
    # 4 blocks between the cold ones, 3 of them skipped at the end
    skipped = [min(step, 4) * 3 // 4 for step in range(6)]
    with torch.no_grad(), without(model, lambda layer, step: 1 <= layer < 1 + skipped[step]):
        want = call(model)
    got = run(model, call, options)
    assert visible_error(got.value, want) < FP32
    assert skipped == [0, 0, 1, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 2])
def test_static_layers_by_rule(warmup):
    model = build("llama", layers=LAYERS)
    call = steps(prompt(2, 13))
    rule = {"layers": "1,3", "method": "ffn_skip", "policy": "static", "warmup": warmup}
    with torch.no_grad(), without(model, lambda layer, step: layer in (1, 3) and step >= warmup):
        want = call(model)
    got = run(model, call, strict(passes=["dense"], rules=[rule]))
    assert visible_error(got.value, want) < FP32
    assert got.rewritten("ffn_skip") == 2 * (got.graphs - (not warmup))  # a prompt ends the run before it
    assert got.rewritten("dense") == LAYERS * got.graphs  # the rule names no method for attention


def test_static_without_warmup_leaves_no_product_behind():
    model = build("llama", layers=2)
    rule = {"layers": "*.mlp", "method": "ffn_skip", "policy": "static", "warmup": 0}
    texts = []
    import sparsify.pipeline as pipeline

    lower = pipeline.lower
    try:
        pipeline.lower = lambda gm, *rest: (texts.append(str(gm.graph)), lower(gm, *rest))[1]
        run(model, lambda m: m(input_ids=torch.tensor([[5]]), use_cache=False).logits, strict(passes=[], rules=[rule]))
    finally:
        pipeline.lower = lower
    assert texts[0].count("_linear(") + texts[0].count("linear_") > 0
    assert "silu" not in texts[0]


@pytest.mark.slow
def test_inductor_gives_the_same():
    model = build("llama", layers=3)
    call = steps(prompt(2, 11), count=4)
    options = {**skipping(threshold=-1.0, warmup=1), "lower": "inductor"}
    with torch.no_grad(), without(model, lambda layer, step: step >= 1 and layer == 1):
        want = call(model)
    assert visible_error(run(model, call, options).value, want) < FP32


@pytest.mark.slow
def test_a_plan_file_decides(tmp_path):
    """Block 1 is left out by similarity, block 3 always: static, in the file alone."""
    model = build("llama", layers=4)
    ids = torch.tensor([[5], [9]])
    call = lambda m: m(input_ids=ids, use_cache=False).logits
    with compiled(model, skipping(threshold=-1.0, skip=1)) as plans, torch.no_grad():
        call(model)
    plan = Plan(list(plans[-1].decisions))
    assert {d.kind for d in plan.decisions} == {"attention", "ffn"}
    assert "4 of 4 feed-forward blocks rewritten" in str(plan)
    *_, similar, last = (d for d in plan.decisions if d.kind == "ffn")
    similar.method, last.options = None, {"policy": "static", "warmup": 0}
    plan.save(tmp_path / "plan.json")
    with torch.no_grad(), without(model, lambda layer, step: layer in (1, 3)):
        want = call(model)
    got = run(model, call, strict(plan=str(tmp_path / "plan.json")))
    assert visible_error(got.value, want) < FP32
    assert got.rewritten("ffn_skip") == 3


def test_without_it_feed_forward_blocks_are_not_looked_for():
    got = run(build("llama"), ONE_TOKEN, strict())
    assert [d.kind for plan in got.plans for d in plan.decisions] == ["attention"] * 2


@pytest.mark.parametrize("options, words", [({"exact": True}, ""), ({"min_length": "auto"}, "saves nothing")])
def test_it_acts_only_where_it_may(options, words):
    got = run(build("llama"), ONE_TOKEN, {**skipping(threshold=-1.0), **options})
    assert got.rewritten() == 0
    assert not words or any(words in r for r in got.refusals())


@pytest.mark.slow
def test_without_position_ids_the_cache_tells_the_position():
    model = build("bloom", "eager", layers=3)
    call = steps(prompt(2, 14), count=5)
    with torch.no_grad(), without(model, lambda layer, step: step >= 3 and layer == 1):
        want = call(model)
    got = run(model, call, skipping(threshold=-1.0, warmup=3))
    assert visible_error(got.value, want) < FP32
    assert got.rewritten("ffn_skip") == 3 * (got.graphs - 1) + 1  # one of the prompt's ends the run before


def test_a_warm_up_needs_positions():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    for warmup in (3, 0):
        got = run(Bare(), lambda m: m(torch.randn(2, 1, 8)), skipping(threshold=-1.0, warmup=warmup))
        assert got.rewritten() == (warmup == 0)
        assert any("no position" in r for r in got.refusals()) == (warmup > 0)


def test_explain_names_the_blocks():
    plan = api.explain(build("llama"), options={"passes": ["ffn_skip", "dense"]}, input_ids=prompt(1, 9), use_cache=False)
    assert "prompts stay dense" in str(plan)


@pytest.mark.slow
def test_experts_are_refused_and_the_rest_is_served():
    """DeepSeek's first layer is dense, its second one routes."""
    model = build("deepseek_v3", layers=2)
    call = steps(prompt(2, 9))
    with torch.no_grad():
        want = call(model)
    got = run(model, call, skipping(threshold=1.5))
    assert visible_error(got.value, want) < FP32
    assert got.rewritten("ffn_skip") == got.graphs - 1
    assert any("experts" in r for r in got.refusals())


def test_a_batch_of_any_size_in_one_graph():
    model = build("llama", layers=3)

    def call(m):
        outputs = []
        for batch in (3, 2, 5):
            cache = DynamicCache(config=m.config)
            ids = prompt(batch, 10)
            m(input_ids=ids[:, :9], **holding(cache))
            outputs.append(m(input_ids=ids[:, 9:], **holding(cache)).logits)
        return torch.cat(outputs)

    with torch.no_grad(), without(model, lambda layer, step: layer == 1):
        want = call(model)
    got = run(model, call, skipping(threshold=-1.0), dynamic=True)
    assert visible_error(got.value, want) < FP32
    assert got.graphs == 2


@pytest.mark.slow
def test_verification_compares_with_the_untouched_graph():
    got = run(build("llama", layers=3), steps(prompt(2, 9)), {**skipping(threshold=-1.0), "verify": True})
    assert got.rewritten("ffn_skip") > 0 and not any(p.fallback for p in got.plans)


# -- the op ----------------------------------------------------------------------------------------------------------------------------

CALL = {
    "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": 1e-6, "post_norm": "none", "post_eps": 0.0,
    "scale": 1.0, "threshold": 0.9, "skip_next": 2, "version": feed_forward.VERSION,
}  # fmt: skip


def weights(hidden: int = 8, intermediate: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return {
        "up": draw(intermediate, hidden), "gate": draw(intermediate, hidden), "down": draw(hidden, intermediate) * 0.2,
        "norm_weight": draw(hidden),
    }  # fmt: skip


def block(x: torch.Tensor, remaining: torch.Tensor, **changes):
    w = weights()
    return torch.ops.sparsify.ffn(x, x, remaining, w["up"], w["down"], gate=w["gate"], norm_weight=w["norm_weight"], **{**CALL, **changes})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=6), st.integers(0, 1000), st.data())
def test_rows_do_not_influence_each_other(counters, seed, data):
    rows = len(counters)
    x = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(seed))
    remaining = torch.tensor(counters, dtype=torch.int32)
    out, after = block(x, remaining)
    changed = data.draw(st.integers(0, rows - 1))
    other, others = x.clone(), remaining.clone()
    other[changed] = data.draw(st.sampled_from([float("nan"), float("inf"), 0.0, 7.0]))
    others[changed] = data.draw(st.integers(-1, 3))
    new_out, new_after = block(other, others)
    kept = torch.arange(rows) != changed
    assert torch.equal(out[kept], new_out[kept])
    assert torch.equal(after[kept], new_after[kept])


def test_counters_step_by_step():
    x = torch.randn(5, 1, 8)
    remaining = torch.tensor([-1, 0, 1, 2, 7], dtype=torch.int32)
    out, after = block(x, remaining, threshold=-1.0, skip_next=3)
    assert after.tolist() == [-1, 3, 0, 1, 6]
    assert torch.equal(out[2:], x[2:])
    assert (out[:2] != x[:2]).any(-1).all()
    _, after = block(x, remaining, threshold=2.0)
    assert after.tolist() == [-1, 0, 0, 1, 6]


def test_a_row_of_nan_reaches_no_threshold():
    x = torch.full((1, 1, 8), float("nan"))
    out, after = block(x, torch.zeros(1, dtype=torch.int32), threshold=-1.0)
    assert out.isnan().all() and after.tolist() == [0]


def test_similarity_is_a_cosine():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.allclose(reference.similarity(a, b), torch.cosine_similarity(a, b), atol=1e-6)
    assert reference.similarity(torch.zeros(8), torch.ones(8)) == 0


def test_fake_kernels_agree_with_the_real_ones():
    x, w = torch.randn(3, 1, 8), weights()
    torch.library.opcheck(
        feed_forward.ffn,
        (x, x, torch.zeros(3, dtype=torch.int32), w["up"], w["down"]),
        {"gate": w["gate"], "norm_weight": w["norm_weight"], **CALL},
        test_utils=("test_schema", "test_faketensor"),
    )
    start = {"warmup": 1, "most": 2, "length": 3, "key": 1, "version": 1}
    torch.library.opcheck(feed_forward.ffn_start, (x, None, -1), start, test_utils=("test_schema", "test_faketensor"))


def take_turns(turns, tokens=5):
    """Decode steps of several (run, model, prompt length), a token each in turn; which of them were dense, by turn."""
    caches = [DynamicCache(config=model.config) for _, model, _ in turns]
    dense = [[] for _ in turns]

    @torch.no_grad()
    def step(i, count, seed):
        with observed() as seen:
            turns[i][1](input_ids=prompt(1, count, seed=seed), **holding(caches[i]))
        if count == 1:
            dense[i].append(all(bool((before < 0).all()) for before, _ in seen))

    for i, (run_in, _, length) in enumerate(turns):
        run_in(step, i, length, i)
    for seed in range(tokens):
        for i, (run_in, _, _) in enumerate(turns):
            run_in(step, i, 1, seed)
    return dense


ALONE = [True, True, False, False, False]
HERE = lambda call, *args: call(*args)


@pytest.mark.slow
@pytest.mark.parametrize("second", [10, 30])  # the positions of one continue those of the other, or do not
def test_models_of_one_shape_count_for_themselves(second):
    models = [build("llama", layers=2, seed=seed) for seed in range(2)]
    with compiled(models[0], skipping(threshold=-1.0, warmup=2)), compiled(models[1], skipping(threshold=-1.0, warmup=2)):
        assert take_turns([(HERE, models[0], 9), (HERE, models[1], second)]) == [ALONE, ALONE]


@pytest.mark.slow
def test_threads_count_for_themselves():
    model = build("llama", layers=2)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as one,
        concurrent.futures.ThreadPoolExecutor(1) as other,
        compiled(model, skipping(threshold=-1.0, warmup=2)),
    ):
        inside = lambda pool: lambda call, *args: pool.submit(call, *args).result()
        assert take_turns([(inside(one), model, 9), (inside(other), model, 10)]) == [ALONE, ALONE]


def test_counts_go_with_their_model():
    weight = torch.nn.Parameter(torch.ones(2))
    place = (torch.device("cpu"), 7)
    with feed_forward.counting(weight, [place]):
        feed_forward.run_state(*place).fill_(5)
        with feed_forward.counting(torch.nn.Parameter(torch.ones(2)), []):
            assert feed_forward.run_state(*place).tolist() == [-2, -2]
        assert feed_forward.run_state(*place).tolist() == [5, 5]
    assert feed_forward.run_state(*place).tolist() == [-2, -2]
    feed_forward.forget_runs()
    with feed_forward.counting(weight, []):
        assert feed_forward.run_state(*place).tolist() == [-2, -2]
    before = len(feed_forward._thread.by_weight)
    del weight
    gc.collect()
    assert len(feed_forward._thread.by_weight) < before
