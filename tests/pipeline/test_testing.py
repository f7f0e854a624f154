import pytest
import torch
from torch import nn

from sparsify import testing
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.ops.selection import observers
from sparsify.planning.plan import Plan
from sparsify.testing import Comparison, Selection, Tokens, bisect, compare, compare_tokens, record_blocks, visible_rows
from tests.support.harness import holding

EAGER = {"lower": "eager", "min_length": 0}
SPARSE = {**EAGER, "strict": True, "passes": ["xattention"], "xattention": {"block": 64, "density": 0.3}}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 256)

    def forward(self, x):
        query, key, value, gate = self.project(x).unflatten(-1, (16, 16)).transpose(1, 2).chunk(4, dim=1)
        y = nn.functional.scaled_dot_product_attention(4 * query, key, value, is_causal=True)
        return x + (y * gate.sigmoid()).transpose(1, 2).flatten(2)


class Decoder(nn.Module):
    """Four layers of plain causal attention: traces in a fraction of the time of a transformers model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        self.head = nn.Linear(64, 128)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape, **heads, pad_token_id=0)).eval()


def tokens(*shape):
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(1))


def test_an_exact_method_is_close_and_the_model_stays_eager(model):
    result = compare(model, tokens(2, 70), options={**EAGER, "passes": ["dense"], "strict": True}, fullgraph=True)
    assert result.close and result.rewritten == 4 and result.rows == 140
    assert result.token_agreement == 1.0 and result.kl < 1e-6 and result.density is None
    assert model._compiled_call_impl is None
    assert "same" in str(result) and "4 of 4 sites" in str(result)


def test_a_lossy_method_differs_and_keep_all_does_not(model):
    inputs = tokens(1, 400)
    sparse = compare(model, inputs, options=SPARSE)
    assert not sparse.close and sparse.relative_error > 1e-2 and sparse.kl > 1e-4
    assert 0 < sparse.density < 0.7 and sparse.rewritten == 4
    assert str(sparse).startswith("DIFFERS")
    kept = compare(model, inputs, options=SPARSE, keep_all=True)
    assert kept.close and kept.density == 1.0 and kept.rewritten == 4


def test_keep_all_reaches_rules_and_plan_files(model, tmp_path):
    inputs = tokens(1, 300)
    rules = [{"layers": "1-2", "method": ["sink_window", "dense"], "window": 8}]
    options = {**EAGER, "passes": ["xattention"], "xattention": {"density": 0.1}, "rules": rules}
    sparse = compare(model, inputs, options=options)
    assert not sparse.close
    assert [d.method for d in sparse.plan.decisions] == ["xattention", "sink_window", "sink_window", "xattention"]
    kept = compare(model, inputs, options=options, keep_all=True)
    assert kept.close and [d.method for d in kept.plan.decisions] == [d.method for d in sparse.plan.decisions]
    sparse.plan.save(tmp_path / "plan.json")
    planned = {**EAGER, "plan": tmp_path / "plan.json"}
    assert not compare(model, inputs, options=planned).close
    assert compare(model, inputs, options=planned, keep_all=True).close


# with their defaults, nothing of which acts in a short prompt by itself
EVERY = {
    "xattention": {},
    "xattention by head": {"threshold": [0.5, 1.0, 0.7, 0.9]},
    "xattention of one stage": {"pool": "max", "density": 0.1, "block": 64},
    "xattention with windows": {"windows": [0, 8, 0, 16], "last_rows": 4},
    "minference": {"columns": 1 << 22},
    "sink_window": {},
    "sink_window by head": {"window": [0, 4096, 0, 0]},
}


@pytest.mark.parametrize("name", EVERY)
def test_keep_all_runs_every_method_at_any_length(model, name):
    method = name.split()[0]
    options = {"lower": "eager", "strict": True, "passes": [method, "dense"], method: EVERY[name]}
    assert not any(d.method == method for d in compare(model, tokens(1, 200), options=options).plan.decisions)
    kept = compare(model, tokens(1, 200), options=options, keep_all=True)
    assert [d.method for d in kept.plan.decisions] == 4 * [method]
    assert kept.close and kept.kept == 4 and kept.density == (None if method == "sink_window" else 1.0)
    assert ", 4 by a lossy method with everything kept" in str(kept) and "NOTHING" not in str(kept)


@pytest.mark.samples(1)
@pytest.mark.parametrize("policy", ["static", "similarity", "schedule"])
def test_keep_all_runs_feed_forward_blocks(llama, policy):
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=tokens(1, 30), **holding(cache))
    cold = {} if policy == "static" else {"cold_first": 0, "cold_last": 0}
    options = {"lower": "eager", "strict": True, "passes": ["ffn_skip", "dense"], "ffn_skip": {"policy": policy, **cold}}
    kept = compare(llama, {"input_ids": tokens(1, 1), **holding(cache)}, options=options, keep_all=True)
    assert kept.close and kept.kept == 2
    assert [d.method for d in kept.plan.decisions if d.kind == "ffn"] == 2 * ["ffn_skip"]


@pytest.mark.parametrize("more", [{"objective": "time"}, {"objective": "memory", "passes": ["dense", "xattention"]}])
def test_an_objective_does_not_choose_dense_under_keep_all(model, more):
    kept = compare(model, tokens(1, 200), options={"lower": "eager", "strict": True, **more}, keep_all=True)
    assert kept.close and kept.kept == 4


def test_errors_that_were_measured_bind_nothing_under_keep_all(model, tmp_path):
    plan = compare(model, tokens(1, 300), options=SPARSE).plan
    for decision in plan.decisions:
        decision.measured = [{"method": "xattention", "options": decision.options, "error": 0.5}]
    plan.save(tmp_path / "plan.json")
    options = {"lower": "eager", "strict": True, "plan": tmp_path / "plan.json", "max_error": 0.1}
    assert {d.method for d in compare(model, tokens(1, 300), options=options).plan.decisions} == {"dense"}
    assert compare(model, tokens(1, 300), options=options, keep_all=True).kept == 4


NOTHING = {  # why no lossy method acts
    "token_select": ({"passes": ["token_select", "dense"]}, "layers are captured in one graph|no site ran a lossy method"),
    "last rows": ({"passes": ["xattention", "dense"], "xattention": {"last_rows": 500}}, "at most 500 rows sees every key"),
    "exact alone": ({"exact": True}, "none comes to act at a site"),
    "dense first": ({"passes": ["dense", "xattention"]}, "none comes to act at a site"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_keep_all_of_nothing_is_loud(model, name):
    options, why = NOTHING[name]
    with pytest.raises(Exception, match=why):  # Dynamo's, where the backend itself raised
        compare(model, tokens(1, 100), options={"lower": "eager", "strict": True, **options}, keep_all=True)
    told = compare(model, tokens(1, 100), options={"lower": "eager", **options}, keep_all=True)
    assert told.close and told.kept == 0
    assert str(told).splitlines()[1].startswith("NOTHING WAS SHOWN OF ANY LOSSY METHOD: ")


def test_a_graph_that_was_left_untouched_kept_nothing(model, monkeypatch):
    def fails(gm, *more):
        if any("sparsify" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("cannot be lowered")
        return gm

    monkeypatch.setattr(testing.pipeline, "_with_few_rows", fails)
    with pytest.warns(UserWarning, match="left a graph untouched"):
        told = compare(model, tokens(1, 100), options={"lower": "eager", "passes": ["xattention"]}, keep_all=True)
    assert told.close and told.kept == 0 and "cannot be lowered" in str(told).splitlines()[1]


def test_padding_rows_are_not_compared(llama):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :13] = 0
    result = compare(llama, {"input_ids": ids, "attention_mask": mask}, options={**EAGER, "passes": ["dense"], "strict": True})
    assert result.close and result.rows == 80 - 13


def test_visible_rows_of_a_chunk_are_the_masks_last():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    logits = torch.zeros(2, 2, 5)
    assert visible_rows(logits, mask).tolist() == [[True, True], [True, False]]
    assert visible_rows(logits, None).all()


def test_options_are_checked_before_anything_runs():
    class Model(nn.Module):
        def forward(self, input_ids):
            return input_ids.float()[..., None]

    with pytest.raises(ConfigError, match="did you mean 'passes'"):
        compare(Model(), tokens(1, 4), options={"pases": []})


def test_a_cache_in_the_inputs_is_not_shared_by_the_two_runs(llama):
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=tokens(1, 30), **holding(cache))
    result = compare(llama, {"input_ids": tokens(1, 5), **holding(cache)}, options={**EAGER, "passes": ["dense"], "strict": True})
    assert result.close and result.rows == 5
    assert cache.get_seq_length() == 30


def difference(eager, compiled):
    return Comparison(
        **testing._difference(eager, compiled, torch.ones(eager.shape[:2], dtype=torch.bool)), bound=1e-3, density=None, plan=Plan()
    )


def test_measures_by_hand():
    eager = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
    compiled = torch.tensor([[[2.0, 0.0], [5.0, 4.0]]])
    result = difference(eager, compiled)
    assert (result.error, result.relative_error, result.token_agreement, result.rows) == (5.0, 1.25, 0.5, 2)
    p, q = torch.tensor([0.0, 4.0]).softmax(0), torch.tensor([5.0, 4.0]).softmax(0)
    assert result.kl == pytest.approx(((p * (p / q).log()).sum() / 2).item(), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_new_nan_or_infinity_is_never_close(value):
    eager = torch.zeros(1, 3, 4)
    compiled = eager.clone()
    compiled[0, 1, 2] = value
    assert not difference(eager, compiled).close
    both = difference(compiled, compiled)
    assert both.close and both.error == 0


def test_many_rows_are_compared_in_parts():
    eager = torch.randn(1, 3 * testing._ROWS + 7, 4)
    compiled = eager.clone()
    compiled[0, -1, 0] += 1000
    result = difference(eager, compiled)
    assert result.rows == eager.shape[1] and result.error == pytest.approx(1000)
    assert result.token_agreement >= 1 - 1 / eager.shape[1]


def test_results_of_other_shape_or_kind_are_refused():
    with pytest.raises(UnsupportedError, match=r"eager gives \[1, 2, 3\]"):
        difference(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3))
    with pytest.raises(UnsupportedError, match="returns no logits but str"):
        testing._logits("text")


def test_greedy_tokens_agree(llama):
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    inputs = {"input_ids": tokens(2, 20), "attention_mask": mask}
    result = compare_tokens(llama, inputs, options={**EAGER, "passes": ["dense"], "strict": True}, max_new_tokens=4)
    assert result.same and result.agreement == 1.0 and result.eager.shape == (2, 4)
    assert result.plan.rewritten and llama._compiled_call_impl is None


@pytest.mark.slow
def test_tokens_under_keep_all(llama):
    ids, how = {"input_ids": tokens(1, 40)}, {"keep_all": True, "max_new_tokens": 3}
    options = {"lower": "eager", "strict": True, "passes": ["xattention", "dense"]}
    assert compare_tokens(llama, ids, options=options, **how).same
    with pytest.raises(UnsupportedError, match="no site ran a lossy method"):
        compare_tokens(llama, ids, options=options | {"passes": ["dense"]}, **how)


def test_token_agreement_counts_missing_tokens():
    result = Tokens(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 5]]), Plan())
    assert result.agreement == 0.5 and not result.same


def test_recorded_blocks_give_a_mask(model):
    with record_blocks() as selections:
        compare(model, tokens(1, 300), options=SPARSE)
    assert len(selections) == 4 and observers() == ()
    for selection in selections:
        mask = selection.mask()
        assert mask.shape == (1, 4, 5, 5) and torch.equal(mask.sum(-1), selection.counts.long())
        assert not mask.triu(1).any() and selection.density == pytest.approx(mask.sum().item() / (4 * 15))


def test_a_mask_ignores_unlisted_indices():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 7, -3], [0, 2, 1]]]], dtype=torch.int16)
    assert Selection(counts, indices, 64, 1.0, 3).mask().tolist() == [[[[True, False, False], [True, False, True]]]]


def rules(*bad):
    harmless = [{"layers": "*", "method": "sink_window", "window": 9999}]
    return harmless + [{"layers": layer, "method": "sink_window", "window": 1, "sinks": 0} for layer in bad]


@pytest.mark.parametrize(("bad", "first"), [(["3"], 3), (["1", "3"], 1)])
def test_bisect_finds_the_first_bad_site(model, bad, first):
    culprit, whole = bisect(model, tokens(1, 100), options={**EAGER, "rules": rules(*bad)})
    assert not whole.close and whole.rewritten == 4
    assert (culprit.method, culprit.site, culprit.alone) == ("sink_window", f"layers.{first}", True)
    again = compare(model, tokens(1, 100), options=culprit.options)
    assert not again.close and again.rewritten == 1


def test_bisect_finds_the_method_first(model):
    steps = []
    options = {**EAGER, "passes": ["dense"], "rules": [{"layers": "2", "method": "sink_window", "window": 1}]}
    culprit, _ = bisect(model, tokens(1, 100), options=options, on_step=lambda step, result: steps.append((step, result.close)))
    assert culprit.site == "layers.2"
    assert steps[:4] == [("everything", False), ("no pass", True), ("dense alone", True), ("sink_window alone", False)]


def test_bisect_of_errors_that_add_up(model):
    every = {**EAGER, "rules": [{"layers": "*", "method": "sink_window", "window": 60}]}
    whole = compare(model, tokens(1, 100), options=every)
    culprit, _ = bisect(model, tokens(1, 100), options=every, tolerance=whole.relative_error * 0.999)
    assert not culprit.alone and "errors add up" in str(culprit)
    assert culprit.comparison.rewritten > 1 and not culprit.comparison.close


def test_bisect_of_a_model_that_does_not_differ(model):
    culprit, whole = bisect(model, tokens(1, 50), options={**EAGER, "passes": ["dense"]})
    assert culprit is None and whole.close
