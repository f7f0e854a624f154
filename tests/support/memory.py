"""How much memory calls take, counted as torch makes their tensors: on any device, the meta device too."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Bytes of the tensors that calls make, alive at once at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.add(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return result

    def add(self, storage_id, size):
        self.known.add(storage_id)
        self.alive += size
        self.most = max(self.most, self.alive)

    def remove(self, storage_id, size):
        self.known.discard(storage_id)
        self.alive -= size
