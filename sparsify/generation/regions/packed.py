"""The tokens of a padded batch, side by side in fewer rows: where each lies here and there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.generation.regions.masks import Later


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a batch [batch, columns] lie in packed rows [rows, length], whose ends may be empty.

    is_token: bool [batch, columns].
    source: int64 [rows, length], the token's place in the batch, row by row; at empty ends some token's, whose result nobody reads.
    documents: int32 [rows, length], number of the batch row that the token is of, `batch` at empty ends.
    places: int32 [rows, length], its place among the tokens of its document, from 0.
    target: int64 [batch, columns], a token's place in the packed rows, row by row; 0 for padding.
    """

    is_token: Tensor
    source: Tensor
    documents: Tensor
    places: Tensor
    target: Tensor

    @classmethod
    def of(cls, is_token: Tensor, starts: Sequence[int], lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> Layout:
        """starts, lengths: first token and number of tokens of each batch row, which stand side by side. rows: the batch rows in each
        packed row."""
        batch, columns = is_token.shape
        length = max(sum(lengths[one] for one in row) for row in rows)
        source = torch.zeros(len(rows), length, dtype=torch.int64)
        documents = torch.full((len(rows), length), batch, dtype=torch.int32)
        places = torch.zeros(len(rows), length, dtype=torch.int32)
        target = torch.zeros(batch, columns, dtype=torch.int64)
        for number, row in enumerate(rows):
            at = 0
            for one in row:
                here, there = slice(at, at + lengths[one]), slice(starts[one], starts[one] + lengths[one])
                source[number, here] = torch.arange(one * columns + there.start, one * columns + there.stop)
                target[one, there] = torch.arange(number * length + here.start, number * length + here.stop)
                documents[number, here] = one
                places[number, here] = torch.arange(lengths[one])
                at = here.stop
            places[number, at:] = torch.arange(length - at)
        return cls(is_token, *(tensor.to(is_token.device, non_blocking=True) for tensor in (source, documents, places, target)))

    @property
    def batch(self) -> int:
        return self.is_token.shape[0]

    @property
    def columns(self) -> int:
        return self.is_token.shape[1]

    @property
    def rows(self) -> int:
        return self.source.shape[0]

    @property
    def length(self) -> int:
        return self.source.shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """[batch or 1, columns, ...] as [rows, length, ...]."""
        if padded.shape[0] == 1:
            return padded[0, self.source % self.columns]
        return padded.flatten(0, 1)[self.source]

    def unpack(self, packed: Tensor) -> Tensor:
        """[rows, length, ...] as [batch, columns, ...], 0 for padding."""
        return unpack(packed, self.target, self.is_token)

    def operands(self) -> dict[str, Tensor]:
        """What a region takes of it."""
        return {"is_token": self.is_token, "documents": self.documents, "places": self.places, "target": self.target}


def unpack(packed: Tensor, target: Tensor, is_token: Tensor) -> Tensor:
    """[rows, length, ...] as [batch, columns, ...], 0 for padding."""
    shown = is_token.view(*is_token.shape, *[1] * (packed.dim() - 2))
    return torch.where(shown, packed.flatten(0, 1)[target], 0)


class PaddedRows(Later):
    """A residual stream [batch, columns, hidden] whose tokens lie in packed rows. What a model does with it between two layers, it does
    with the real one.

    packed: [rows, length, hidden].
    lying: where its tokens lie.
    made: the real one, once it was asked for; what holds from then on.
    """

    packed: Tensor
    lying: Layout
    made: Tensor | None

    def __new__(cls, packed: Tensor, layout: Layout) -> PaddedRows:
        shape = layout.batch, layout.columns, packed.shape[2]
        rows = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=packed.dtype, device=packed.device)
        rows.packed, rows.lying, rows.made = packed, layout, None
        return rows

    def make(self) -> Tensor:
        if self.made is None:
            self.made = self.lying.unpack(self.packed)
        return self.made

    def rows(self) -> Tensor:
        """As they lie in packed rows."""
        return self.packed if self.made is None else self.lying.pack(self.made)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PaddedRows({tuple(self.shape)})"


def unpack_heads(packed: Tensor, packing: dict[str, Tensor]) -> Tensor:
    """[rows, heads, length, dim] as [batch, heads, columns, dim], the transpose of a contiguous [batch, columns, heads, dim]. packing:
    `Layout.operands`."""
    return unpack(packed.transpose(1, 2), packing["target"], packing["is_token"]).transpose(1, 2)
