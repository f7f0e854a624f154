"""A model's call over a prompt that is divided among processes: each runs the layers over its own tokens, as if they were all of them, and
attention alone knows of the others (`sparsify.backends.divided`).

Every process is given the whole prompt and gives back what one process would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.distributed import agreement, collectives, exchange, sequence
from sparsify.distributed.sequence import Division
from sparsify.distributed.shards import Shard
from sparsify.errors import DistributedError, UnsupportedError
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.regions import caches

WHERE = "context parallelism"


class DividedCalls:
    """Calls of a model whose prompts are divided.

    last: the division of the last prompt that was read, with the bytes that were sent for it; None before the first.
    """

    def __init__(self, model: nn.Module, shard: Shard):
        self.model, self.shard = model, shard
        self.signature = inspect.signature(model.forward)
        self.last: Division | None = None
        # a file of the model's own may hold every argument in **kwargs
        self.named = [p.name for p in self.signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's call with these arguments. run: makes a call with keyword arguments as if there were no other process."""
        given = self._bound(args, kwargs)
        tokens = next((value for name in ("input_ids", "inputs_embeds") if isinstance(value := given.get(name), Tensor)), None)
        if tokens is None:
            raise UnsupportedError("the call has neither input_ids nor inputs_embeds", where=WHERE)
        cache = next((given[name] for name in caches.CACHES if given.get(name) is not None), None)
        started = cache is not None and cache.get_seq_length() > 0
        if started and tokens.shape[1] == 1:
            return run(**given)
        self._check(given, cache, started)
        self._check_alike(tokens)
        mask = given.get("attention_mask")
        division = self.last = Division.of(tokens.shape[1], self.shard, padded=mask is not None and not bool(mask.all()))
        local, kept = self._local(division, given, tokens)
        with sequence.dividing(division):
            result = run(**local)
        if isinstance(cache, SparseCache):
            cache.divide(division.tokens, self.shard)
        result.logits = self._logits(division, result.logits, kept)
        return result

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs).arguments
        variable = next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        return {**{name: value for name, value in bound.items() if name != variable}, **bound.get(variable, {})}

    def _check(self, given: dict[str, Any], cache: Any, started: bool) -> None:
        mask = given.get("attention_mask")
        reasons = {
            "a prompt after another in one cache": started,
            "a cache that is no SparseCache of the policy full": cache is not None and not _serves(cache),
            "a cache that the model makes": cache is None and given.get("use_cache") is True,
            "gradients": torch.is_grad_enabled(),
            "labels": given.get("labels") is not None,
            "hidden states or attention weights": given.get("output_hidden_states") or given.get("output_attentions"),
            "a mask of four dimensions": mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2),
            "return_dict=False": given.get("return_dict") is False,
        }
        for what, holds in reasons.items():
            if holds:
                raise UnsupportedError(f"{what}: not served where a prompt is divided among processes", where=WHERE)

    def _check_alike(self, tokens: Tensor) -> None:
        """Raises DistributedError on every process where they are given prompts of other sizes: collectives would wait for each other."""
        agreement.agree(self.shard.group, {"the size of the prompt": str(tuple(tokens.shape))}, where=WHERE)

    def _local(self, division: Division, given: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], int]:
        """The arguments for this process's tokens, and how many of the last tokens' logits are wanted."""
        local, device = dict(given), tokens.device
        for name in ("input_ids", "inputs_embeds"):
            if local.get(name) is not None:
                local[name] = division.own(local[name], 1)
        positions = given.get("position_ids")
        at = division.positions(device)
        local["position_ids"] = at[None] if positions is None else positions[..., at]
        alone = all(given.get(name) is None for name in caches.CACHES)
        local["attention_mask"] = given["attention_mask"][:, at] if division.padded else None
        if not division.padded and alone:
            # keeps transformers from taking the jump between chunks for the start of another document
            local["attention_mask"] = torch.ones(tokens.shape[0], len(at), dtype=torch.long, device=device)
        keep = given.get("logits_to_keep", 0)
        if isinstance(keep, Tensor):
            raise UnsupportedError("logits_to_keep as a tensor: not served where a prompt is divided among processes", where=WHERE)
        if keep and "logits_to_keep" in self.named:
            local["logits_to_keep"] = (at >= division.tokens - keep).nonzero()[:, 0]
        if alone:
            local["use_cache"] = False
        return local, keep

    def _logits(self, division: Division, own: Tensor, kept: int) -> Tensor:
        """Of the last `kept` tokens (0: of all), [batch, tokens, vocabulary]."""
        if not kept:
            return exchange.gathered(division, own, 1, "logits")
        whole = own.new_zeros(own.shape[0], min(kept, division.tokens), own.shape[2])
        at = division.positions(own.device) - (division.tokens - whole.shape[1])
        whole[:, at[at >= 0]] = own
        division.note("logits", whole)
        return collectives.all_reduce(whole, division.shard.group)


def _serves(cache: Any) -> bool:
    return isinstance(cache, SparseCache) and all(layer.grows and not layer.codes and layer.read is None for layer in cache.layers)


def shard_of(mesh: Any) -> Shard:
    """Raises DistributedError for a mesh without the dimension that a text is divided along."""
    names = mesh.mesh_dim_names or ()
    if sequence.DIMENSION not in names:
        hint = f'init_device_mesh(device, (n,), mesh_dim_names=("{sequence.DIMENSION}",))'
        raise DistributedError(f"the mesh has the dimensions {names}, none of them {sequence.DIMENSION!r}", where="mesh", hint=hint)
    along = mesh[sequence.DIMENSION]
    return Shard(along.get_local_rank(), along.size(), along.get_group().group_name)
