"""A chat over a long document with a cache that keeps a quarter of it.

    python examples/sparse_cache_chat.py

SnapKV keeps, per KV head, the tokens that the end of the prompt looks at: here the question. Later turns go on over what was kept, so the
memory and the time of a turn do not grow with the document.
"""

from __future__ import annotations

import inspect

import torch
from long_document import MODEL, VALUE, document, tokens
from transformers import LlamaForCausalLM

import sparsify

LENGTH, BUDGET = 3000, 750


@torch.no_grad()
def main() -> tuple[list[bool], float]:
    """Prints the turns; returns whether each was answered right, and the share of the document's keys and values that was kept."""
    text, facts = document(LENGTH, seed=1)
    key, value = list(facts.items())[3]
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    # tokens are bytes here: the question is 12 of them, and 15 hold a fact together; of words the defaults do
    cache = sparsify.SparseCache(model.config, policy="snapkv", budget=BUDGET, window=12, kernel=15)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before transformers 5.24
    said, right = tokens(text), []
    for turn in range(3):
        said = torch.cat((said, tokens(f"\n?? {key}: ")), 1)
        begin = said.shape[1]
        said = model.generate(
            said, attention_mask=torch.ones_like(said), max_new_tokens=VALUE, do_sample=False, pad_token_id=0, **{name: cache}
        )
        answer = bytes(said[0, begin:].tolist()).decode("latin-1")
        right.append(answer == value)
        print(f"turn {turn + 1}: ?? {key}: {answer} (true: {value}); {cache.get_seq_length()} tokens seen")
    config = model.config
    everything = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * said.shape[1] * 4  # bytes, float32
    share = cache.kept_bytes() / everything
    print(f"kept: {cache.kept_bytes() / 2**20:.2f} MiB, {share:.0%} of what every token would take")
    return right, share


if __name__ == "__main__":
    main()
