"""ffn_parts: a long prompt's feed-forward block, some rows after the others. Exact.

Gate and up give [rows, intermediate] each: at a million tokens of an 8B model 28 GiB, twice, beside a residual stream of 8. Rows do not
read each other, so a part of them at a time gives the same with the memory of one part, and parts of this size keep products at their full
rate. The norm before and the sum after it stay Inductor's. Shorter prompts are left to Inductor, which fuses more.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
from pydantic import Field

from sparsify.ops import feed_forward
from sparsify.planning.method import (
    Context,
    Device,
    Editor,
    FeedForwardSite,
    Pass,
    Proposal,
    Refusal,
    SiteKind,
    feed_forward_in_parts_seconds,
)


class FfnParts(Pass):
    """See the options' descriptions."""

    name: ClassVar[str] = "ffn_parts"
    lossy: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("ffn",)

    part_rows: int = Field(32768, ge=1, le=1 << 30, description="rows that are computed at once")
    memory_share: float = Field(
        1 / 16,
        gt=0,
        le=1,
        description="share of the GPU's memory from which on gate and up of a block, together, are made in parts",
    )
    min_rows: int | None = Field(
        None, ge=1, le=1 << 30, description="rows from which on it acts, in place of `memory_share`, on any device"
    )

    def looks_for_sites(self, device: Device | None) -> bool:
        return self.min_rows is not None or (device is not None and device.memory is not None)

    def propose(self, site: FeedForwardSite, context: Context) -> Proposal | Refusal:
        """Asking for the number of rows installs a guard where it is symbolic: torch compiles one graph on each side of it."""
        if site.phase == "decode":
            return self.refuse("a token of each row needs no memory")
        if site.needs_grad:
            return self.refuse("gradients are required", "run under torch.no_grad() or torch.inference_mode()")
        product = site.product
        if product is None or product.meta["example_value"].dtype != site.dtype:
            return self.refuse("products are computed in another dtype, under autocast", "convert the model")
        first = self._first_row(site, context.device)
        if first is None:
            return self.refuse("the device's memory is not known", "set min_rows")
        if not bool(site.output.meta["example_value"].numel() >= first * int(site.hidden)):
            return self.refuse(f"fewer than {first} rows: what the block makes on its way fits")
        seconds = feed_forward_in_parts_seconds(site.sizes, context.device, self.part_rows)
        rows = sympy.Min(sympy.sympify(site.rows), self.part_rows)
        return Proposal(self, seconds, note=f"exact; {self.part_rows} rows at a time", scratch=rows * _row_bytes(site))

    def _first_row(self, site: FeedForwardSite, device: Device) -> int | None:
        if self.min_rows is not None:
            return self.min_rows
        return None if device.memory is None else int(self.memory_share * device.memory) // _row_bytes(site)

    def rewrite(self, editor: Editor, site: FeedForwardSite) -> None:
        assert site.source is not None and site.product is not None  # as in propose
        editor.move_to(site)
        product = editor.call(
            feed_forward.ffn_parts,
            site.source,
            site.up,
            site.down,
            gate=site.gate,
            up_bias=site.up_bias,
            gate_bias=site.gate_bias,
            down_bias=site.down_bias,
            layout=site.layout,
            transposed=site.transposed,
            activation=site.activation,
            part_rows=self.part_rows,
            version=feed_forward.VERSION,
        )
        editor.replace(site, editor.repeated(site.output, site.product, product))


def _row_bytes(site: FeedForwardSite) -> int:
    """Of gate and up, or of up alone, for one row."""
    return (1 if site.layout == "plain" else 2) * int(site.intermediate) * site.dtype.itemsize
