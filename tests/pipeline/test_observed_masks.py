"""Masks that arrive as inputs are looked at on every call: what was compiled for one form is used where the mask has it, nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from sparsify import api
from sparsify.rewriting.observed_masks import LOOKED_AT
from tests.support.harness import strict

LOWEST = torch.finfo(torch.float32).min
LENGTH = 8


def places(query_len=LENGTH, key_len=LENGTH):
    return torch.arange(query_len)[:, None], torch.arange(key_len)[None]


def keep(*left):
    return (torch.arange(LENGTH) >= torch.tensor(left)[:, None])[:, None, None]


Q, K = places()
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
SAYING = {
    "causal": (K <= Q, "causal"),
    "what hides": ((K > Q)[None, None], "causal"),
    "window": ((K <= Q) & (K > Q - 3), "causal, window 3"),
    "padding": ((K <= Q) & keep(0, 2), "causal, padding"),
    "documents": ((K <= Q) & (DOCUMENTS[:, None] == DOCUMENTS), "causal, documents"),
    "minus infinity": (torch.where((K <= Q) & keep(0, 2), 0.0, -torch.inf), "causal, padding"),
    "nothing hidden": (torch.zeros(LENGTH, LENGTH), "none"),
    "rows in the midst": (places(3)[1] <= places(3)[0] + 2, "causal from amax"),
    "rows at the top": (places(3)[1] <= places(3)[0], "causal from 0"),
}
REFUSED = {
    "random": torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.5,
    "prefix": (K <= Q) | (K < 3),
    "heads that differ": torch.stack([K <= Q, (K <= Q) & (K > Q - 2)]),
    "not a number": torch.where(K <= Q, 0.0, torch.nan),
}
BIASES = {
    "three numbers": torch.where(K <= Q, 0.0, torch.where(K > Q + 2, -torch.inf, LOWEST)),
    "many numbers": torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)),
    "a number that scores may reach": torch.where(K <= Q, 0.0, -1.0),
}


def attend(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend_hidden(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~mask)


def operands(query_len=LENGTH, key_len=LENGTH):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, length, 16, generator=generator) for length in (query_len, key_len, key_len)]


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="sparsify", options=strict(passes=["dense"], **options))


def check(run, function, mask):
    given = operands(mask.shape[-2])
    torch.testing.assert_close(run(*given, mask), function(*given, mask), equal_nan=True)


@pytest.mark.parametrize("name", SAYING)
@torch.no_grad()
def test_what_is_observed(name):
    mask, words = SAYING[name]
    function = attend_hidden if name == "what hides" else attend
    run = compiled(function)
    with api.collect_plans() as plans:
        check(run, function, mask)
    (decision,) = (d for plan in plans for d in plan.decisions)
    assert (decision.method, decision.mask) == ("dense", f"{words} ({LOOKED_AT})"), decision.refusals


@torch.no_grad()
def test_what_is_not_observed_is_refused():
    run = compiled(attend)
    for mask in REFUSED.values():
        with api.collect_plans() as plans:
            check(run, attend, mask)
        assert not [d for plan in plans for d in plan.decisions if d.method is not None]


@torch.no_grad()
@pytest.mark.parametrize("name", BIASES)
def test_what_holds_other_numbers_than_a_mask_is_a_bias(name):
    """Whatever later calls bring is added as it is."""
    run = compiled(attend)
    with api.collect_plans() as plans:
        for mask in (BIASES[name], *BIASES.values()):
            check(run, attend, mask)
    assert [d.method for d in plans[0].decisions] == ["dense"]


@torch.no_grad()
def test_a_mask_that_says_something_else_is_not_taken_for_the_one_before():
    """One compiled function, masks of one shape: Dynamo's guards cannot tell them apart."""
    run = compiled(attend)
    square = [mask for mask, _ in SAYING.values() if mask.shape == (LENGTH, LENGTH) and mask.dtype is torch.bool]
    square += [mask for mask in REFUSED.values() if mask.shape == (LENGTH, LENGTH) and mask.dtype is torch.bool]
    one_off = K <= Q
    one_off = one_off.clone()
    one_off[5, 6] = True
    with api.collect_plans() as plans:
        for mask in (*square, one_off, *square):
            check(run, attend, mask)
    words = [d.mask for plan in plans for d in plan.decisions if d.method]
    assert len(words) == len(set(words)) == 3, words


@pytest.mark.parametrize("write", ["in place", "through data", "a view", "inference"])
def test_a_mask_that_is_written_between_two_calls(write):
    run, given = compiled(attend), operands()
    with torch.inference_mode() if write == "inference" else torch.no_grad():
        mask = (K <= Q).clone()
        check(run, attend, mask)
        before = run(*given, mask)
        {"through data": mask.data, "a view": mask[:]}.get(write, mask).bitwise_and_(K > Q - 2)
        check(run, attend, mask)
        assert not torch.equal(run(*given, mask), before)


@torch.no_grad()
def test_a_mask_that_is_written_in_the_graph_is_left_alone():
    def function(query, key, value, mask):
        mask.logical_or_(places()[1] == 0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    run = compiled(function)
    with api.collect_plans() as plans:
        for mask in (K <= Q, K < Q):
            given = operands()
            mine, theirs = mask.clone(), mask.clone()
            torch.testing.assert_close(run(*given, mine), function(*given, theirs))
            assert torch.equal(mine, theirs)
    assert [d.method for plan in plans for d in plan.decisions] == [None]


@torch.no_grad()
def test_the_mask_that_is_returned_is_the_one_that_came():
    run = compiled(lambda query, key, value, mask: (attend(query, key, value, mask), mask, mask[None]))
    mask = K <= Q
    _, same, view = run(*operands(), mask)
    assert same is mask and view.data_ptr() == mask.data_ptr()


@torch.no_grad()
def test_a_mask_made_before_a_graph_break():
    def function(query, key, value, padding):
        q, k = places(query.shape[2], key.shape[2])
        mask = (k <= q) & padding[:, None, None]
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    run = compiled(function)
    with api.collect_plans() as plans:
        for left in (0, 2, 0, 3):
            given, padding = operands(), keep(0, left)[:, 0, 0]
            torch.testing.assert_close(run(*given, padding), function(*given, padding))
    masks = [(d.mask, d.method) for plan in plans for d in plan.decisions]
    assert masks == [(f"causal ({LOOKED_AT})", "dense"), (f"causal, padding ({LOOKED_AT})", "dense")]


class Buffered(torch.nn.Module):
    """As GPT-Neo writes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(), persistent=False)

    def forward(self, query, key, value):
        first, last = key.shape[2] - query.shape[2], key.shape[2]
        scores = query @ key.transpose(-1, -2)
        hidden = torch.finfo(scores.dtype).min
        return torch.where(self.bias[:, :, first:last, :last], scores, hidden).softmax(-1) @ value


@pytest.mark.parametrize("change", ["in place", "another buffer", "through data"])
@torch.no_grad()
def test_a_causal_buffer_that_changes(change):
    model, given = Buffered(), operands(4)
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        run = torch.compile(model, backend="sparsify", options=strict(passes=["dense"]))
        torch.testing.assert_close(run(*given), model(*given))
        before = model(*given)
        window = model.bias.triu(-2)
        if change == "another buffer":
            model.bias = window
        else:
            (model.bias if change == "in place" else model.bias.data).copy_(window)
        assert not torch.equal(model(*given), before)
        torch.testing.assert_close(run(*given), model(*given))
    masks = [(d.mask, d.method) for plan in plans for d in plan.decisions]
    assert masks[0] == (f"causal ({LOOKED_AT})", "dense") and masks[1:] == [(f"causal, window 3 ({LOOKED_AT})", "dense")]


class Factored(torch.nn.Module):
    """As OpenAI's GPT writes it, whose number is -10000. number: what hides."""

    def __init__(self, number, factor):
        super().__init__()
        self.register_buffer("bias", factor[None, None], persistent=False)
        self.number = number

    def forward(self, query, key, value):
        scores = query @ key.transpose(-1, -2)
        shown = self.bias[:, :, : scores.shape[-2], : scores.shape[-1]]
        return (scores * shown + self.number * (1 - shown)).softmax(-1) @ value


@pytest.mark.parametrize(
    ("number", "factor", "why"),
    [
        (LOWEST, torch.ones(16, 16).tril(), ""),
        (LOWEST, torch.ones(16, 16).tril().triu(-2), ""),
        (-1e4, torch.ones(16, 16).tril(), "the mask adds -10000"),
        (LOWEST, torch.ones(16, 16).tril() * 0.5, "a factor that is not known to be 0 or 1"),
        (LOWEST, torch.ones(16, 16).tril() + 1, "a factor that is not known to be 0 or 1"),
    ],
)
@torch.no_grad()
def test_a_factor_that_arrives(number, factor, why):
    """Read where the mask beside it hides by the lowest number; scores may stand below any other."""
    model, given = Factored(number, factor), operands()
    given[0] *= 3
    torch._dynamo.reset()
    run = torch.compile(model, backend="sparsify", options=strict(passes=["dense"]))
    with api.collect_plans() as plans:
        torch.testing.assert_close(run(*given), model(*given))
        model.bias.copy_(torch.ones(16, 16).tril(-3).logical_not())  # and now something else
        torch.testing.assert_close(run(*given), model(*given))
    decision = plans[0].decisions[0]
    assert (decision.method is None) == bool(why) and why in decision.reason, decision.reason


@torch.no_grad()
def test_token_types_that_are_all_one():
    """Visibility by `or`, of which a prompt without images needs one side alone."""

    def function(query, key, value, types):
        q, k = places(query.shape[2], key.shape[2])
        block = torch.where(types == 1, types.cumsum(-1), -1)
        same = (block[:, :, None] == block[:, None]) & (block != -1)[:, :, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=((k <= q) | same)[:, None])

    run, given = compiled(function), operands()
    text = torch.zeros(2, LENGTH, dtype=torch.long)
    image = text.clone()
    image[:, 2:5] = 1
    with api.collect_plans() as plans:
        for types in (text, image, text):
            torch.testing.assert_close(run(*given, types), function(*given, types))
    first, second = (d for plan in plans for d in plan.decisions)
    assert (first.mask, first.method, second.method) == (f"causal ({LOOKED_AT})", "dense", None)


class Attention(torch.nn.Module):
    def forward(self, states, mask):
        return attend(states, states, states, mask)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(), Attention()])

    def forward(self, states, mask):
        for layer in self.layers:
            states = layer(states, mask)
        return states


@torch.no_grad()
def test_rules_by_name_hold_for_a_graph_that_is_captured_again():
    model = Layers()
    torch._dynamo.reset()
    rules = [{"layers": ["layers.1"], "method": ["sink_window"], "sink_window": {"sinks": 1, "window": 2}}]
    run = torch.compile(model, backend="sparsify", options=strict(passes=["dense"], rules=rules))
    states = operands()[0]
    with api.collect_plans() as plans:
        for left in (0, 2):
            run(states, (K <= Q) & keep(0, left))
    assert [[(d.site, d.method) for d in plan.decisions] for plan in plans] == [[("layers.0", "dense"), ("layers.1", "sink_window")]] * 2


@torch.no_grad()
def test_threads_with_masks_of_their_own():
    run, given = compiled(attend), operands()
    masks = [K <= Q, (K <= Q) & (K > Q - 3), REFUSED["random"]]
    wrong = []

    def work(mask):
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(run(*given, mask), attend(*given, mask), atol=1e-5):
                    wrong.append(mask)

    run(*given, masks[0])
    threads = [threading.Thread(target=work, args=(mask,)) for mask in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@torch.no_grad()
def test_what_inductor_compiles():
    torch._dynamo.reset()
    run = torch.compile(attend, backend="sparsify", options=strict(passes=["dense"], lower="inductor"), dynamic=True)
    for name in ("padding", "window", "padding", "documents"):
        check(run, attend, SAYING[name][0])
    for mask in (REFUSED["random"], REFUSED["prefix"]):
        check(run, attend, mask)
