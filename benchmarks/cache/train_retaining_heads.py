"""Trains the retaining heads of the policy "locret" for a byte-level Llama, on prompts whose facts are asked for at their end.

    python -m benchmarks run train_retaining_heads --model DIR --text FILE --out heads.safetensors
    python -m benchmarks run eviction answers --model DIR --text FILE --policies locret snapkv knorm --heads heads.safetensors

A token's target is the largest logit that any query of the questions and answers gives it, of the query heads of a KV head (Locret, arXiv
2410.01805, section 3.2), less the layer's mean, over its deviation; the loss is the smooth L1 distance. The model stays as it is. The
seeds of its prompts are none that `eviction` asks. Prints the loss of held-out prompts as it goes; records nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.answers.run import load
from benchmarks.lib import needles

# far from those of `needles.FIRST_SEED` on
SEEDS = 7_000_000
_ROWS = 512  # tokens of a training step


@torch.no_grad()
def observed(model: LlamaForCausalLM, ids: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """By layer: what its tokens before `first` show and what the others make of them.

    Returns:
        queries, keys and values before rotation, fp16 [first, all of them side by side]; the largest logit of each KV head, fp32
        [first, kv_heads].
    """
    parts: dict[int, dict[str, Tensor]] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            note = lambda module, args, out, number=number, name=name: parts.setdefault(number, {}).update({name: out})
            hooks.append(getattr(layer.self_attn, name).register_forward_hook(note))
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    dim, kv_heads, found = model.config.head_dim, model.config.num_key_value_heads, []
    for layer in range(model.config.num_hidden_layers):
        mine = parts[layer]
        query, key = (mine[name].unflatten(-1, (-1, dim)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        query, key = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(query, at))
        asking = query[:, :, first:].unflatten(1, (kv_heads, -1)).flatten(2, 3)[0].float()
        logits = asking @ key[0, :, :first].float().transpose(-1, -2) * dim**-0.5
        states = torch.cat([mine[name][0, :first] for name in ("q_proj", "k_proj", "v_proj")], -1)
        found.append((states.half(), logits.amax(1).T.contiguous()))
    return found


def examples(model: LlamaForCausalLM, text: bytes, length: int, seeds: range) -> list[tuple[Tensor, Tensor]]:
    """As `observed`, of many prompts one after the other."""
    found = []
    for seed in seeds:
        item = needles.prompt(length, text, seed)
        found.append(observed(model, item.ids.to(model.device), item.questions[0]))
    return [tuple(torch.cat([prompt[layer][part] for prompt in found]) for part in (0, 1)) for layer in range(len(found[0]))]


class Head(torch.nn.Module):
    """w2 · SiLU(w1 · states)."""

    def __init__(self, width: int, hidden: int, kv_heads: int):
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(width, hidden, bias=False), torch.nn.Linear(hidden, kv_heads, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(states)))


def train(known: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], hidden: int, steps: int) -> tuple[Head, Iterator[float]]:
    """A head, and its loss over held-out tokens after each tenth of the steps, which are made as the losses are taken."""
    (states, targets), (other, wanted) = known, held_out
    mean, deviation = targets.mean(0), targets.std(0).clamp(min=1e-3)
    head = Head(states.shape[1], hidden, targets.shape[1]).to(states.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)

    def loss(states: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(head(states.float()), (targets - mean) / deviation)

    def run() -> Iterator[float]:
        for step in range(steps):
            rows = torch.randint(len(states), (_ROWS,), device=states.device)
            optimizer.zero_grad()
            loss(states[rows], targets[rows]).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, steps // 10) == 0:
                with torch.no_grad():
                    yield loss(other, wanted).item()

    return head, run()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide facts in")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the heads")
    parser.add_argument("--length", type=int, default=4096, help="bytes of a prompt")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64, help="numbers between the two layers of a head; 1024 in the paper")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options, started = parse(arguments), time.monotonic()
    torch.manual_seed(0)
    model, text = load(options.model, options.device), options.text.read_bytes()
    known = examples(model, text, options.length, range(SEEDS, SEEDS + options.prompts))
    print(f"{len(known[0][0])} tokens of {options.prompts} prompts after {time.monotonic() - started:.0f} s", flush=True)
    held_out = examples(model, text, options.length, range(SEEDS + options.prompts, SEEDS + options.prompts + max(1, options.prompts // 8)))
    weights = {}
    for layer in range(len(known)):
        head, losses = train(known[layer], held_out[layer], options.hidden, options.steps)
        print(f"layer {layer}: {' '.join(f'{loss:.3f}' for loss in losses)}, {time.monotonic() - started:.0f} s", flush=True)
        for name in ("w1", "w2"):
            weights[f"layers.{layer}.{name}"] = getattr(head, name).weight.detach().half().cpu().contiguous()
    save_file(weights, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
