"""Muon for the stacked matrices, AdamW for the rest."""

from __future__ import annotations

import torch

from benchmarks.answers.code_model.decoder import Decoder


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About the nearest orthogonal matrix of each of [count, rows, columns] (K. Jordan et al., Muon, 2024)."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon with AdamW's step size for the stacked matrices, AdamW for embedding and norms."""

    def __init__(self, model: Decoder, fused: bool) -> None:
        self.setup, self.dtype = model.setup, torch.bfloat16 if fused else torch.float32
        self.matrices = list(model.matrices.values())
        self.momentum = [torch.zeros_like(weight) for weight in self.matrices]
        small = [model.embedding, model.norms]
        self.adam = torch.optim.AdamW(small, lr=self.setup.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for weight, momentum in zip(self.matrices, self.momentum, strict=True):
            gradient = weight.grad
            assert gradient is not None
            momentum.lerp_(gradient, 0.05)
            update = newton_schulz(gradient.lerp(momentum, 0.95), self.dtype)
            weight.mul_(1 - rate * self.setup.weight_decay)
            weight.add_(update, alpha=-rate * 0.2 * max(weight.shape[1:]) ** 0.5)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
