"""locret: a trained head says of each token, when it comes, what later ones will make of it.

Huang et al., "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads on Consumer-Grade Devices", arXiv
2410.01805, sections 3.2 and 3.3.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.policies.base import EVERY_QUERY, Candidates, LayerFacts, Layout, Numbers, Policy
from sparsify.policies.rotation import Rotation, angles_on


class Locret(Policy):
    """Tokens stay to which a small network of the layer gives the highest scores, per KV head, and the last `recent`.

    The network reads a token's query, key and value, of all heads, before rotation: `w2 · SiLU(w1 · [q, k, v])`. A score is given once,
    when the token comes, and stays with it, so that a prompt can be read in chunks: each brings the cache back to its budget.

    heads: safetensors file with `layers.N.w1` [hidden, query heads * head_dim + KV heads * (head_dim + v_head_dim)] and `layers.N.w2`
        [kv_heads, hidden] for each layer N of those that evict.
    digest: SHA-256 of that file; the cache says it, and a file that has changed since is refused.
    recent: last tokens that stay whatever their scores.
    layer: number of the layer; the cache says it.
    frequencies: angle per position of each rotated pair; the cache says it.
    """

    name: ClassVar[str] = "locret"

    heads: str = Field("", description="safetensors file of the trained heads")
    digest: str = Field("", description="SHA-256 of that file; the cache says it")
    recent: int = Field(100, ge=1, le=1 << 20, description="last tokens that stay, in tokens")
    layer: int = Field(0, ge=0, description="number of the layer; the cache says it")
    frequencies: Numbers = Field((), description="of the rotary embedding; the cache says them")

    @model_validator(mode="before")
    @classmethod
    def _digest(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("heads") and not given.get("digest"):
            path = Path(given["heads"])
            if not path.is_file():
                raise ValueError(f"there is no file {path}")
            return given | {"heads": str(path), "digest": _sha256(path)}
        return given

    def bind(self, layer: LayerFacts) -> Policy:
        bound = self.model_copy(update={"layer": layer.index, "frequencies": tuple(layer.inverse_frequencies().tolist())})
        bound.weights()
        return bound

    def weights(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """w1 and w2 of the layer, fp32.

        Raises:
            ConfigError: the file is missing, has changed, or has no such layer.
        """
        if not self.heads:
            raise self.refuse("no trained heads are given", "SparseCache(..., heads=FILE.safetensors)")
        try:
            return _read(self.heads, self.digest, self.layer, torch.device(device))
        except (OSError, ValueError, SafetensorError) as error:
            raise self.refuse(f"the heads of layer {self.layer} are not read: {error}", "train them for this very model") from error

    def layout(self, budget: int | None) -> Layout:
        if budget is None or budget <= self.recent:
            raise self.refuse(f"a budget of {budget} leaves nothing beside the last {self.recent}", f"give at least {self.recent + 1}")
        return Layout(budget, pinned=budget - self.recent, recent=self.recent)

    @property
    def observed(self) -> int:
        return EVERY_QUERY

    @property
    def turns_back(self) -> bool:
        return True

    @property
    def carries(self) -> bool:
        return True

    @property
    def scores_once(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> Tensor:
        queries, asked, at, carried = candidates.queries, candidates.query_positions, candidates.positions, candidates.carried
        if queries is None or asked is None or carried is None:
            raise self.refuse("what a token got when it came is not known", "SparseCache(..., every=...)")
        kv_heads, count = at.shape[1:]
        fresh = queries.shape[2]
        if not fresh:
            return carried
        # the query of a token, which is known once: positions of queries rise, behind those that are none
        place = torch.searchsorted(asked.contiguous(), at.flatten(1).contiguous()).view(at.shape).clamp(max=fresh - 1)
        known = (asked[:, None].expand(-1, kv_heads, -1).gather(2, place) == at) & (at >= 0)
        # of each query its token, which all heads hold when it comes
        token = torch.searchsorted(at[:, 0].contiguous(), asked.contiguous()).clamp(max=count - 1)
        back = Rotation.by(-asked, angles_on(queries, self.frequencies))
        of_token = lambda state: state.gather(2, token[:, None, :, None].expand(-1, kv_heads, -1, state.shape[3]))
        query, key = (back.turn(state.float()) for state in (queries, of_token(candidates.keys)))
        value = of_token(candidates.values).float()
        found = self.scores(torch.cat([state.transpose(1, 2).flatten(2) for state in (query, key, value)], -1))
        return torch.where(known, found.transpose(1, 2).gather(2, place), carried)

    def scores(self, states: Tensor) -> Tensor:
        """fp32 [batch, tokens, kv_heads] of queries, keys and values before rotation, fp32 [batch, tokens, all of them side by side].

        Raises:
            ConfigError: the heads were trained for other sizes.
        """
        w1, w2 = self.weights(states.device)
        if w1.shape[1] != states.shape[2] or w2.shape[1] != w1.shape[0]:
            raise self.refuse(f"heads {list(w1.shape)} and {list(w2.shape)} for {states.shape[2]} numbers of a token", "train them anew")
        return F.silu(states @ w1.T) @ w2.T

    def carry(self, candidates: Candidates, scores: Tensor) -> Tensor:
        return scores


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
@torch.inference_mode(False)
def _read(path: str, digest: str, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept where they are used: a selection must not wait for the host's memory. Raises OSError, ValueError or SafetensorError for what
    cannot be read."""
    if _sha256(Path(path)) != digest:
        raise ValueError(f"{path} is not the file that the cache was made with")
    with safe_open(path, "pt") as file:
        w1, w2 = (file.get_tensor(f"layers.{layer}.{name}").float().to(device) for name in ("w1", "w2"))
    return w1, w2
