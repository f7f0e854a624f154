"""A padding mask whose rows have a symbol of their own is the batch's by a guard: where it is not, another graph is right."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import api, pipeline

LENGTH = 12


def attend(query, key, value, mask):
    """As transformers writes a padding mask: nothing in the graph relates its rows to the batch's."""
    rows = torch.arange(query.shape[0])[:, None, None, None]
    columns = torch.arange(key.shape[2])
    visible = (columns <= columns[:, None]) & mask.bool()[rows, columns]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def operands(batch, rows):
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[0, :4], mask[-1, :7] = 0, 0
    query, key, value = torch.randn(3, batch, 2, LENGTH, 16)
    for tensor in (query, key, value, mask):
        torch._dynamo.mark_dynamic(tensor, 0)  # each a symbol of its own
    return query, key, value, mask


def test_rows_of_a_mask_are_the_batch_by_a_guard():
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="sparsify", options={"passes": ["dense"], "lower": "eager"}, fullgraph=True)
    made = []
    with torch.no_grad(), api.collect_plans() as plans:
        for batch, rows in ((3, 3), (5, 5), (3, 4), (2, 2)):
            given = operands(batch, rows)
            torch.testing.assert_close(compiled(*given)[:, :, 7:], attend(*given)[:, :, 7:])
            made.append(len(plans))
    (decision,) = plans[0].decisions
    assert decision.method == "dense" and decision.validation.endswith("agree"), decision.reason
    assert made == [1, 1, 2, 2], "a mask of other rows gets a graph of its own, and only that"


def test_a_look_at_longer_calls_takes_no_guard_away(monkeypatch):
    rewrite = pipeline.rewrite_graph
    monkeypatch.setattr(pipeline, "rewrite_graph", lambda gm, config, trace, longer=None: rewrite(gm, config, trace, []))
    torch._dynamo.reset()
    options = {"passes": ["xattention", "dense"], "min_length": 1000, "validation": False, "lower": "eager"}
    compiled = torch.compile(attend, backend="sparsify", options=options, fullgraph=True)
    with torch.no_grad():
        for batch, rows in ((3, 3), (3, 4)):
            given = operands(batch, rows)
            torch.testing.assert_close(compiled(*given)[:, :, 7:], attend(*given)[:, :, 7:])


def test_a_second_model_of_another_batch_in_one_process():
    """Dynamo then compiles for a batch that varies and a length that does not, with a symbol for each input."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    torch._dynamo.reset()
    with torch.no_grad():
        for rows, padding in ((1, 0), (3, 4)):
            model = LlamaForCausalLM(config).eval()
            ids, mask = torch.randint(0, 64, (rows, 20)), torch.ones(rows, 20, dtype=torch.long)
            mask[0, :padding] = 0
            want = model(input_ids=ids, attention_mask=mask).logits
            model.compile(backend="sparsify", options={"passes": ["dense"], "lower": "eager", "strict": True})
            with api.collect_plans() as plans:
                got = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
            (plan,) = plans
            assert [decision.method for decision in plan.decisions] == ["dense"], plan.decisions[0].reason
