"""Which families pack a padded batch (`unpad`), as data, and how one family is checked.

A family is served, and then each token of a padded prompt, of a generated token and of a second turn equals eager execution's; or it is
refused for the reason given, and the batch is padded.
"""

from __future__ import annotations

from transformers import DynamicCache

import sparsify
from tests.support import padding
from tests.support.harness import strict
from tests.support.tiny_models import EAGER_ONLY, FAMILIES, build, spread_weights

LENGTHS, PARTS = (20, 1, 33, 9), (33, 1, 9)

# family -> the sentence for the documentation
REFUSED = dict.fromkeys(
    ("falcon", "falcon_mqa", "falcon_alibi", "bloom", "stablelm"), "the model is captured whole, and has no place between its layers"
)
SERVED = tuple(family for family in FAMILIES if family not in REFUSED)


def check(family: str, side: str) -> None:
    """Raises AssertionError where the family does not do what the table says. side: of the padding."""
    model, whole = build(family, "eager" if family in EAGER_ONLY else "sdpa"), padding.text(LENGTHS, side, later=10)
    spread_weights(model)
    want = padding.calls(model, whole, DynamicCache(config=model.config), *PARTS)
    passes = ["unpad", "dense"]
    sparsify.compile(model, **strict(passes=passes, unpad={"when": "always"}, strict=family not in REFUSED))
    found = padding.calls(model, whole, DynamicCache(config=model.config), *PARTS)
    error = (padding.tokens_of(found.logits, whole) - padding.tokens_of(want.logits, whole)).abs().max()
    assert error < 1e-4 * padding.tokens_of(want.logits, whole).abs().max()
    if family in REFUSED:
        assert found.batches == []
        return
    assert [d.method for d in found.batches] == ["unpad"]
    prompts = [d for plan in found.plans for d in plan.decisions if d.kind == "attention" and "documents" in d.mask]
    assert len(prompts) == 2 and all(d.method == "dense" for d in prompts)
