"""Which families let tokens go on alone behind a layer (`token_select`), as data, and how one family is checked.

A family is served, and then a prompt, a token and a second turn equal an eager model whose later layers hide what was left out; or it is
refused for the reason given, and the prompt is dense.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

import sparsify
from sparsify import api
from sparsify.planning.decision import Decision
from tests.support import token_selection
from tests.support.harness import holding, strict
from tests.support.tiny_models import EAGER_ONLY, VOCAB, build, spread_weights

SELECT = {"layer": 1, "heads": [0, 3], "keep": 40, "window": 12, "sinks": 2, "queries": 6, "kernel": 3}
LAYERS, PROMPT, LENGTHS = 4, 80, (80, 1, 19)

# family -> what the refusal says, and the sentence for the documentation
WINDOWS = ("counts places", "a sliding window in every layer, of which none can choose")
TABLES = ("rotary tables", "layers are not given rotary tables, by which rows would keep their positions")
WHOLE = ("captured in one graph", "the model is captured whole, and has no place between its layers")
SERVED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gpt_neox",
    "olmo2",
    "gemma",
    "starcoder2",
    "cohere",
    "granite",
    "gptj",
    "gemma2",
    "gpt_oss",
)
REFUSED: dict[str, tuple[str, str]] = {
    "mistral_window": WINDOWS,
    **dict.fromkeys(("gpt2", "opt"), TABLES),
    **dict.fromkeys(("falcon", "falcon_mqa", "falcon_alibi", "bloom"), WHOLE),
}


@torch.no_grad()
def check(family: str) -> None:
    """Raises AssertionError where the family does not do what the table says."""
    model = build(family, "eager" if family in EAGER_ONLY else "sdpa", layers=LAYERS)
    spread_weights(model)
    ids = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    dense = model(ids, use_cache=False).logits
    if family in REFUSED:
        decision = _decision(model, ids)
        assert decision.method is None and REFUSED[family][0] in decision.refusals[0], decision.refusals
        return
    kept = token_selection.chosen(model, {"input_ids": ids[:, :PROMPT]}, SELECT)
    want = token_selection.hidden_later(model, {"input_ids": ids}, kept, PROMPT, SELECT["layer"])
    sparsify.compile(model, **strict(passes=["token_select", "dense"], token_select=SELECT))
    cache = DynamicCache(config=model.config)
    with api.collect_plans() as plans:
        found = torch.cat([model(part, **holding(cache)).logits for part in ids.split(LENGTHS, 1)], 1)
    rows = [*kept[0], *range(PROMPT, sum(LENGTHS))]
    scale = want[0, rows].abs().max()
    assert (found[0, rows] - want[0, rows]).abs().max() < 1e-4 * scale
    assert (dense[0, rows] - want[0, rows]).abs().max() > 1e-2 * scale, "leaving tokens out must change something"
    assert [d.sizes["kept"] for plan in plans for d in plan.decisions if d.kind == "stream"] == [str(SELECT["keep"])]


def _decision(model: torch.nn.Module, ids: torch.Tensor) -> Decision:
    """What is decided for a prompt, without `strict`, which would raise."""
    sparsify.compile(model, passes=["token_select", "dense"], token_select=SELECT, lower="eager", min_length=0)
    with api.collect_plans() as plans:
        model(ids[:, :PROMPT], **holding(DynamicCache(config=model.config)))
    (found,) = {id(d): d for plan in plans for d in plan.decisions if d.kind == "stream"}.values()
    return found
