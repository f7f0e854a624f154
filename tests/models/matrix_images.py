"""Which families of models that see let image tokens leave (`fastv`, `divprune`), as data, and how one family is checked.

A family is served, and then a prompt with an image, a token and a second turn equal an eager model whose later layers hide what was left
out; or it is refused for the reason given, and the prompt is what it would be without.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

import sparsify
from sparsify import api
from tests.support import image_selection, token_selection
from tests.support.harness import holding, strict

OPTIONS = {"fastv": {"layer": 1, "queries": 3, "keep": 0.25}, "divprune": {"keep": 0.25}}
LAYERS, PROMPT, LENGTHS = 4, 60, (1, 19)

SERVED = ("llava", "qwen2_5_vl", "qwen2_vl", "internvl", "gemma3", "paligemma")
# family -> what the refusal says, and the sentence for the documentation
REFUSED: dict[str, tuple[str, str]] = {
    "qwen3_vl": ("added again", "features of images are added again behind later layers"),
}


@torch.no_grad()
def check(family: str, name: str) -> None:
    """Raises AssertionError where the family does not do what the table says."""
    model = image_selection.build(family, LAYERS)
    given = image_selection.prompt(model, PROMPT)
    ids = torch.cat((given["input_ids"], torch.randint(3, 100, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))), 1)
    whole = image_selection.with_tokens(model, given, ids)
    options = {"passes": [name, "dense"], name: OPTIONS[name]}
    if family in REFUSED:
        dense = model(**given, use_cache=False).logits[0]
        sparsify.compile(model, lower="eager", min_length=0, **options)
        with api.collect_plans() as plans:
            found = model(**given, use_cache=False).logits[0]
        assert torch.allclose(found, dense, rtol=1e-4, atol=1e-4)
        (decision,) = {id(d): d for plan in plans for d in plan.decisions if d.kind == "stream"}.values()
        assert decision.method is None and REFUSED[family][0] in decision.refusals[0], decision.refusals
        return
    dense = model(**whole, use_cache=False).logits[0]
    order = image_selection.looked_at(model, given, 1, 3) if name == "fastv" else image_selection.far_apart(model, given)
    (columns,) = image_selection.kept(model, given, order, OPTIONS[name]["keep"])
    want = token_selection.hidden_later(model, whole, [columns], PROMPT, 1 if name == "fastv" else -1)[0]
    sparsify.compile(model, **strict(**options))
    cache = DynamicCache(config=model.config)
    with api.collect_plans() as plans:
        parts = [model(**given, **holding(cache)).logits[0]]
        parts += [model(input_ids=part, **holding(cache)).logits[0] for part in ids[:, PROMPT:].split(LENGTHS, 1)]
    found, rows = torch.cat(parts), [*columns, *range(PROMPT, len(dense))]
    scale = want[rows].abs().max()
    assert (found[rows] - want[rows]).abs().max() < 1e-4 * scale
    assert (dense[rows] - want[rows]).abs().max() > 1e-2 * scale, "leaving tokens out must change something"
    assert [d.sizes["kept"] for plan in plans for d in plan.decisions if d.kind == "stream"] == [str(len(columns))]
