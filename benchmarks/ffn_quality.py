"""What skipping feed-forward blocks does to answers and to text: real similarity against skipping at random and against whole layers.

Skipping is decided row by row and attention always runs, so a decode step with given tokens equals a row of one causal pass: the second
half of each prompt stands for generated tokens, the first half for the (dense) prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import needles
from sparsify.backends.reference_ffn import similarity
from sparsify.calibrate import SKIPS, simulate

COLD = (1, 1)


@dataclass
class Skipper:
    """Decides per row, inside a LlamaForCausalLM, which blocks are left out; counts them.

    rule: (layer, similarity so far known as a callable, rows) is handled by the subclasses of policy below.
    """

    kind: str  # "dense", "similarity", "random" or "layers"
    threshold: float = 2.0
    skip: int = 1
    share: float = 0.0  # random: probability that an eligible row skips a block between the cold ones
    layers: tuple[int, ...] = ()
    seed: int = 0
    skipped: int = 0
    seen: int = 0
    table: list[Tensor] = field(default_factory=list)

    def start(self, rows: int, device: torch.device) -> None:
        self.left = torch.zeros(rows, dtype=torch.long, device=device)
        self.eligible = torch.arange(rows, device=device) >= rows // 2
        self.random = torch.Generator(device=device).manual_seed(self.seed)

    def block(self, layer: int, count: int, before: Tensor, update: Tensor) -> Tensor:
        """The block's update [1, rows, hidden] with skipping rows set to 0."""
        warm = COLD[0] <= layer < count - COLD[1]
        if self.kind == "random" and warm:
            skip = torch.rand(len(self.left), generator=self.random, device=self.left.device) < self.share
        elif self.kind == "layers":
            skip = torch.full_like(self.eligible, layer in self.layers)
        else:
            skip = self.left > 0
        skip = skip & self.eligible
        update = torch.where(skip[None, :, None], 0, update)
        alike = similarity(before, before + update)[0]
        self.table.append(alike[self.eligible].cpu())
        if self.kind == "similarity" and warm:
            self.left = torch.where(skip, self.left - 1, torch.where(alike >= self.threshold, self.skip, 0))
        if layer == count - COLD[1] - 1:
            self.left.zero_()
        self.skipped += int(skip.sum())
        self.seen += int(self.eligible.sum())
        return update


@contextmanager
def skipping(model: torch.nn.Module, skipper: Skipper) -> Iterator[None]:
    layers = model.model.layers
    handles, held = [], {}
    for i, layer in enumerate(layers):
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda m, inputs, i=i: held.__setitem__(i, inputs[0])))
        handles.append(layer.mlp.register_forward_hook(lambda m, inputs, out, i=i: skipper.block(i, len(layers), held[i], out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evaluate(model: torch.nn.Module, skipper: Skipper, length: int, text: bytes, prompts: int) -> dict:
    """NLL in nats a byte over generated text, '##' answers right of those asked, and the share of blocks that eligible rows skipped."""
    device = next(model.parameters()).device

    def forward(ids: Tensor) -> Tensor:
        skipper.start(ids.shape[1], device)
        return model(input_ids=ids, use_cache=False).logits

    with skipping(model, skipper):
        score = needles.score(forward, length, text, range(needles.FIRST_SEED, needles.FIRST_SEED + prompts), device=device)
    low, high = needles.wilson(score.right, score.asked)
    return {
        "nll": score.nll,
        "right": score.right,
        "asked": score.asked,
        "interval": [low, high],
        "share": skipper.skipped / skipper.seen,
    }


def thresholds(table: Tensor, shares: list[float]) -> list[tuple[float, int, float]]:
    """(threshold, k, expected share) for each wanted share and k that can reach it, from similarities [blocks, rows] of the dense model."""
    found = []
    for share, skip in itertools.product(shares, SKIPS[:3]):
        low, high = -1.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if simulate(table, *COLD, middle, skip).float().mean() >= share else (low, middle)
        reached = simulate(table, *COLD, low, skip).float().mean().item()
        if reached >= share - 1e-3:
            found.append((low, skip, reached))
    return found


def cells(table: Tensor, shares: list[float]) -> list[Skipper]:
    """What is compared: every policy over the skip share."""
    blocks = len(table)
    warm = range(COLD[0], blocks - COLD[1])
    cells = [Skipper("similarity", threshold=threshold, skip=skip) for threshold, skip, _ in thresholds(table, shares)]
    cells += [Skipper("random", share=min(1.0, share * blocks / len(warm)), seed=seed) for share in shares for seed in (0, 1)]
    cells += [
        Skipper("layers", layers=chosen)
        for size in (1, 2, 3)
        for chosen in itertools.combinations(range(blocks), size)
        if size < 3 or set(chosen) <= set(warm)
    ]
    return cells


@torch.no_grad()
def run(model: torch.nn.Module, length: int, text: bytes, prompts: int, shares: list[float], report: Callable[[dict], None]) -> None:
    """Reports one dictionary per cell, the dense model first."""
    dense = Skipper("dense")
    result = evaluate(model, dense, length, text, prompts)
    blocks = len(model.model.layers)
    table = torch.stack([torch.cat(dense.table[i::blocks]) for i in range(blocks)])
    means = [round(float(row.mean()), 5) for row in table]
    report({"policy": "dense", "similarity_by_block": means, **result})
    for cell in cells(table.float(), shares):
        result = evaluate(model, cell, length, text, prompts)
        report(
            {
                "policy": cell.kind,
                "threshold": cell.threshold if cell.kind == "similarity" else None,
                "skip": cell.skip if cell.kind == "similarity" else None,
                "probability": cell.share if cell.kind == "random" else None,
                "layers": list(cell.layers),
                **result,
            }
        )
