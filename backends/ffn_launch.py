"""Which implementation serves the feed-forward ops, decided at every call: generated Triton kernels or the reference."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sparsify import ffn_ops
from sparsify.backends import launch, reference_ffn
from sparsify.errors import KernelError, UnsupportedError

log = logging.getLogger(__name__)


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    log.warning("%s runs the slow reference: %s", op, reason)


def ffn(residual: Tensor, input: Tensor, remaining: Tensor, *args: Tensor, **call) -> tuple[Tensor, Tensor]:
    out, after = _serve("ffn", residual, input, remaining, *args, **call)
    for observer in ffn_ops.observers():
        observer(remaining, after)
    return out, after


def ffn_start(like: Tensor, *args, **call) -> Tensor:
    return _serve("ffn_start", like, *args, **call)


def ffn_prompt(like: Tensor, *, key: int, version: int) -> Tensor:
    ffn_ops.end_run(like.device, key)
    return like.clone(memory_format=torch.contiguous_format)


def _serve(op: str, first: Tensor, *args, **call):
    kind, _ = launch.available(first.device)
    if kind == "triton":
        from sparsify.backends import triton_ffn

        try:
            return getattr(triton_ffn, op)(first, *args, **call)
        except (UnsupportedError, KernelError) as error:
            if not launch.recovers(error):
                raise
            _warn_once(op, str(error))
    return getattr(reference_ffn, op)(first, *args, **call)


launch.register("ffn", ffn)
launch.register("ffn_prompt", ffn_prompt)
launch.register("ffn_start", ffn_start)
