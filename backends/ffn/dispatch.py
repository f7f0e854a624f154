"""Which implementation serves the feed-forward ops, decided at every call: generated Triton kernels or the reference."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sparsify.backends import dispatch
from sparsify.backends.ffn import reference
from sparsify.errors import KernelError, UnsupportedError
from sparsify.ops import feed_forward

log = logging.getLogger(__name__)


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    log.warning("%s runs the slow reference: %s", op, reason)


def ffn(residual: Tensor, input: Tensor, remaining: Tensor, *args: Tensor, **call) -> tuple[Tensor, Tensor]:
    out, after = _serve("ffn", residual, input, remaining, *args, **call)
    for observer in feed_forward.observers():
        observer(remaining, after)
    return out, after


def ffn_start(like: Tensor, *args, **call) -> Tensor:
    return _serve("ffn_start", like, *args, **call)


def ffn_prompt(like: Tensor, *, key: int, version: int) -> Tensor:
    feed_forward.end_run(like.device, key)
    return like.clone(memory_format=torch.contiguous_format)


def _serve(op: str, first: Tensor, *args, **call):
    kind, _ = dispatch.available(first.device)
    if kind == "triton":
        from sparsify.backends.ffn import few_rows

        try:
            return getattr(few_rows, op)(first, *args, **call)
        except (UnsupportedError, KernelError) as error:
            if not dispatch.recovers(error):
                raise
            _warn_once(op, str(error))
    return getattr(reference, op)(first, *args, **call)


dispatch.register("ffn", ffn)
dispatch.register("ffn_prompt", ffn_prompt)
dispatch.register("ffn_start", ffn_start)
