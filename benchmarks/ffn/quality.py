"""What skipping feed-forward blocks does to answers and to text: real similarity against skipping at random and against whole layers.

Skipping is decided row by row and attention always runs, so a decode step with given tokens equals a row of one causal pass: the second
half of each prompt stands for generated tokens, the first half for the prompt, which is dense unless a cell's rows are "all".
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.lib import needles
from sparsify.backends.ffn.reference import similarity
from sparsify.commands.calibrate.feed_forward import SKIPS, cold_regions, simulate

# up to so many blocks, every set of one and of two layers is tried
_FEW = 8


@dataclass
class Skipper:
    """Decides per row, inside a LlamaForCausalLM, which blocks are left out; counts them.

    kind: "dense"; "similarity"; "random" (each row and block between the cold ones by itself); "layers" (the blocks of `layers`, for every
    row); "whole_layers" (their attention, too: its time is saved on top and not counted).
    """

    kind: str
    threshold: float = 2.0
    skip: int = 1
    share: float = 0.0  # random: probability that an eligible row skips a block between the cold ones
    layers: tuple[int, ...] = ()
    rows: str = "generated"
    cold: tuple[int, int] = (1, 1)
    seed: int = 0
    skipped: int = 0
    seen: int = 0
    table: list[Tensor] = field(default_factory=list)

    def start(self, rows: int, device: torch.device) -> None:
        self.left = torch.zeros(rows, dtype=torch.long, device=device)
        self.eligible = torch.arange(rows, device=device) >= (rows // 2 if self.rows == "generated" else 0)
        self.random = torch.Generator(device=device).manual_seed(self.seed)

    def attention(self, layer: int, update: Tensor) -> Tensor:
        """The attention's update [1, rows, hidden]; of a whole layer that is left out, only ineligible rows keep it."""
        if self.kind != "whole_layers" or layer not in self.layers:
            return update
        return torch.where(self.eligible[None, :, None], 0, update)

    def block(self, layer: int, count: int, before: Tensor, update: Tensor) -> Tensor:
        """The block's update [1, rows, hidden] with skipping rows set to 0."""
        warm = self.cold[0] <= layer < count - self.cold[1]
        if self.kind == "random" and warm:
            skip = torch.rand(len(self.left), generator=self.random, device=self.left.device) < self.share
        elif self.kind in ("layers", "whole_layers"):
            skip = torch.full_like(self.eligible, layer in self.layers)
        else:
            skip = self.left > 0
        skip = skip & self.eligible
        update = torch.where(skip[None, :, None], 0, update)
        alike = similarity(before, before + update)[0]
        if self.kind == "dense":
            self.table.append(alike[self.eligible].cpu())
        if self.kind == "similarity" and warm:
            self.left = torch.where(skip, self.left - 1, torch.where(alike >= self.threshold, self.skip, 0))
        if layer == count - self.cold[1] - 1:
            self.left.zero_()
        self.skipped += int(skip.sum())
        self.seen += int(self.eligible.sum())
        return update


@contextmanager
def skipping(model: torch.nn.Module, skipper: Skipper) -> Iterator[None]:
    layers = model.model.layers
    handles, held = [], {}
    for i, layer in enumerate(layers):
        handles.append(layer.self_attn.register_forward_hook(lambda m, inputs, out, i=i: (skipper.attention(i, out[0]), *out[1:])))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda m, inputs, i=i: held.__setitem__(i, inputs[0])))
        handles.append(layer.mlp.register_forward_hook(lambda m, inputs, out, i=i: skipper.block(i, len(layers), held[i], out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evaluate(model: torch.nn.Module, skipper: Skipper, length: int, text: bytes, prompts: int, asked: int = 32) -> dict:
    """NLL in nats a byte over generated text, '##' answers right of those asked, and the share of blocks that eligible rows skipped.

    asked: facts of a prompt; half of them are asked for.
    """
    device = next(model.parameters()).device

    def forward(ids: Tensor) -> Tensor:
        skipper.start(ids.shape[1], device)
        return model(input_ids=ids, use_cache=False).logits

    seeds = range(needles.FIRST_SEED, needles.FIRST_SEED + prompts)
    with skipping(model, skipper):
        score = needles.score(forward, length, text, seeds, needles=asked, asks=max(1, asked // 2), device=device)
    low, high = needles.wilson(score.right, score.asked)
    return {
        "nll": score.nll,
        "right": score.right,
        "asked": score.asked,
        "interval": [low, high],
        "share": skipper.skipped / skipper.seen,
    }


def thresholds(table: Tensor, shares: list[float], cold: tuple[int, int]) -> list[tuple[float, int, float]]:
    """(threshold, k, expected share) for each wanted share and k that can reach it, from similarities [blocks, rows] of the dense model."""
    found = []
    for share, skip in itertools.product(shares, SKIPS[:3]):
        low, high = -1.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if simulate(table, *cold, middle, skip).float().mean() >= share else (low, middle)
        reached = simulate(table, *cold, low, skip).float().mean().item()
        if reached >= share - 1e-3:
            found.append((low, skip, reached))
    return found


def layer_sets(table: Tensor, shares: list[float], cold: tuple[int, int]) -> list[tuple[int, ...]]:
    """Layers to leave out. Of few: every one, every two, and three between the cold ones. Of many, for each share: those that turn the
    stream least, and two random sets between the cold ones."""
    blocks = len(table)
    warm = range(cold[0], blocks - cold[1])
    if blocks <= _FEW:
        sets = [chosen for size in (1, 2, 3) for chosen in itertools.combinations(range(blocks), size)]
        return [chosen for chosen in sets if len(chosen) < 3 or set(chosen) <= set(warm)]
    alike = sorted(warm, key=lambda i: -float(table[i].mean()))
    drawn = random.Random(0)
    sizes = sorted({size for share in shares if 0 < (size := round(share * blocks)) <= len(warm)})
    found = [tuple(sorted(chosen)) for size in sizes for chosen in (alike[:size], drawn.sample(warm, size), drawn.sample(warm, size))]
    return list(dict.fromkeys(found))


def cells(table: Tensor, shares: list[float]) -> list[Skipper]:
    """What is compared: every policy over the skip share."""
    blocks = len(table)
    cold = (1, 1) if blocks <= _FEW else cold_regions(table)
    warm = blocks - sum(cold)
    picked = thresholds(table, shares, cold)
    cells = [Skipper("similarity", threshold=t, skip=skip, cold=cold, rows=rows) for rows in ("generated", "all") for t, skip, _ in picked]
    cells += [Skipper("random", share=p, seed=seed, cold=cold) for s in shares if (p := s * blocks / warm) <= 1 for seed in (0, 1)]
    sets = layer_sets(table, shares, cold)
    whole = sets if blocks > _FEW else [chosen for chosen in sets if len(chosen) < 2]
    return cells + [Skipper("layers", layers=chosen) for chosen in sets] + [Skipper("whole_layers", layers=chosen) for chosen in whole]


@torch.no_grad()
def run(
    model: torch.nn.Module,
    length: int,
    text: bytes,
    prompts: int,
    shares: list[float],
    report: Callable[[dict], None],
    needles: int = 32,
) -> None:
    """Reports one dictionary per cell, the dense model first."""
    dense = Skipper("dense")
    result = evaluate(model, dense, length, text, prompts, needles)
    blocks = len(model.model.layers)
    table = torch.stack([torch.cat(dense.table[i::blocks]) for i in range(blocks)]).float()
    means = [round(float(row.mean()), 5) for row in table]
    report({"policy": "dense", "similarity_by_block": means, **result})
    for cell in cells(table[:, :: max(1, table.shape[1] // 8192)], shares):
        result = evaluate(model, cell, length, text, prompts, needles)
        report(
            {
                "policy": cell.kind,
                "rows": cell.rows,
                "threshold": cell.threshold if cell.kind == "similarity" else None,
                "skip": cell.skip if cell.kind == "similarity" else None,
                "probability": cell.share if cell.kind == "random" else None,
                "seed": cell.seed if cell.kind == "random" else None,
                "layers": list(cell.layers),
                **result,
            }
        )
