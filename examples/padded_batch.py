"""Prompts of different lengths in one compiled batch: each row gets the answer that it gets alone, uncompiled.

    python examples/padded_batch.py

The shorter prompts are padded on the left. What the mask says of the padding is read from the graph; nothing is configured.
"""

from __future__ import annotations

import torch
from long_document import MODEL, VALUE, document, tokens
from transformers import LlamaForCausalLM

LENGTHS = (500, 1200, 800)


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, n] as one batch [rows, longest], padded on the left, and its attention mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    pad = lambda row, value: torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value)
    return torch.cat([pad(prompt, 0) for prompt in prompts]), torch.cat([pad(torch.ones_like(prompt), 0) for prompt in prompts])


@torch.no_grad()
def main() -> tuple[list[str], list[str]]:
    """Prints the answers; returns those of the batch and those of each prompt alone."""
    prompts, wanted = [], []
    for seed, length in enumerate(LENGTHS):
        text, facts = document(length, seed)
        key, value = list(facts.items())[seed]
        prompts.append(tokens(f"{text}\n?? {key}: "))
        wanted.append(value)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    def answers(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        said = model.generate(ids, attention_mask=mask, max_new_tokens=VALUE, do_sample=False, pad_token_id=0)
        return [bytes(row.tolist()).decode("latin-1") for row in said[:, ids.shape[1] :]]

    alone = [answers(prompt, torch.ones_like(prompt))[0] for prompt in prompts]
    model.compile(backend="sparsify", options={"config": str(MODEL / "sparsify.toml"), "lower": "eager"})  # as in long_document.py
    together = answers(*padded(prompts))
    for length, value, *found in zip(LENGTHS, wanted, together, alone, strict=True):
        print(f"{length:5} bytes: true {value}, in the batch {found[0]}, alone {found[1]}")
    return together, alone


if __name__ == "__main__":
    main()
