"""Which heads of a layer know what later layers will look at, from one dense run over each prompt.

A token counts by the most that any later head's last queries give it: heads that find one fact look at it almost alone, and a mean would
drown it. A set of heads is as good as the share of that which the tokens hold that it chooses; heads are added while they help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import backends
from sparsify.commands.calibrate.attention.capture import Capture, Captured
from sparsify.errors import UnsupportedError
from sparsify.ops.cache import CacheMassCall
from sparsify.passes.token_select import TokenSelect
from sparsify.planning import registry
from sparsify.planning.config import config

MOST_HEADS = 4
_ENOUGH = 1e-3  # share that a further head must add


@torch.no_grad()
def looks(
    model: nn.Module, prompts: Sequence[Tensor], options: Mapping[str, Any], queries: int, progress: Callable[[], None]
) -> list[Tensor]:
    """What each prompt's last queries look at.

    Args:
        prompts: int64 [1, tokens] each.
        queries: last rows whose attention counts.
        progress: called after each prompt.

    Returns:
        by prompt fp32 [layers, query_heads, tokens]: mean attention that each key gets. Layers without an attention of a whole causal
        prompt are NaN.

    Raises:
        UnsupportedError: there is no such attention, or layers have several or differ in heads.
    """
    settings = config.load({**options, "min_length": 0, "plan": None, "lower": "eager"}, method_models=registry.discover())
    found: dict[int, Tensor] = {}

    def receive(site: Captured, query: Tensor, key: Tensor, value: Tensor) -> None:
        if site.layer is None or site.layer in found:
            raise UnsupportedError("attention that is not one of each decoder layer", where=str(site.place))
        found[site.layer] = last_queries(query, key, site.scale, queries)

    capture, taken = Capture(model, settings, receive), []
    with capture.running() as forward, backends.serving(settings.kernels):
        for prompt in prompts:
            found.clear()
            forward(prompt)
            if len({one.shape for one in found.values()}) != 1:
                reasons = sorted(set(capture.refused.values())) or ["layers differ in their heads" if found else "there is none"]
                raise UnsupportedError(f"no attention whose heads could choose: {reasons[0]}")
            whole = torch.full_like(next(iter(found.values())), torch.nan)
            taken.append(torch.stack([found.get(layer, whole) for layer in range(max(found) + 1)]))
            progress()
    return taken


def last_queries(query: Tensor, key: Tensor, scale: float, queries: int) -> Tensor:
    """Mean attention of the last rows of a causal prompt.

    Args:
        query: [1, query_heads, tokens, head_dim]. key: [1, kv_heads, tokens, head_dim].

    Returns:
        fp32 [query_heads, tokens].
    """
    rows, at = query[:, :, -queries:], torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
    positions = at.expand(1, key.shape[1], -1).contiguous()
    mass = CacheMassCall(rows, key, positions, at[None, -rows.shape[2] :], scale=scale, softcap=0.0).run()
    return mass[0] / rows.shape[2]


def looked_at_later(look: Tensor, method: TokenSelect) -> Tensor:
    """fp32 [layers, tokens]: the most that any head of a layer behind each gives a token; 0 for tokens that go on anyway.

    Args:
        look: fp32 [layers, query_heads, tokens], of one prompt.
    """
    most = look.nan_to_num(0.0).amax(1)
    most[:, : method.sinks] = 0
    most[:, most.shape[1] - method.window :] = 0
    later = most.flip(0).cummax(0).values.flip(0)
    return torch.cat((later[1:], torch.zeros_like(later[:1])))


def choose_heads(looks_of: Sequence[Tensor], layer: int, method: TokenSelect) -> tuple[tuple[int, ...], float]:
    """The heads of a layer that choose best.

    Args:
        looks_of: as `looks` returns them.
        method: says how many tokens go on.

    Returns:
        the heads, rising; the share of what later layers look at that their tokens hold, the mean over prompts. No heads where the layer
        was not measured.
    """
    wanted = [looked_at_later(look, method)[layer] for look in looks_of]
    masses = [look[layer] for look in looks_of]
    if any(bool(mass.isnan().any()) for mass in masses):
        return (), 0.0
    chosen: tuple[int, ...] = ()
    best = 0.0
    while len(chosen) < min(MOST_HEADS, masses[0].shape[0]):
        left = [head for head in range(masses[0].shape[0]) if head not in chosen]
        shares = torch.stack(
            [_held(mass, want, [(*chosen, head) for head in left], method) for mass, want in zip(masses, wanted, strict=True)]
        )
        share, at = shares.mean(0).max(0)
        if float(share) < best + _ENOUGH:
            break
        best, chosen = float(share), (*chosen, left[int(at)])
    return tuple(sorted(chosen)), best


def _held(mass: Tensor, wanted: Tensor, sets: Sequence[tuple[int, ...]], method: TokenSelect) -> Tensor:
    """fp32 [sets]: the share of `wanted`, fp32 [tokens], at the tokens that each set of heads chooses. mass: fp32 [query_heads, tokens]."""
    stacked = mass[torch.tensor(sets, device=mass.device)]
    columns = method.model_copy(update={"heads": "all"}).choose(stacked, None, mass.shape[1])
    return wanted[columns].sum(-1) / wanted.sum().clamp(min=1e-30)
