"""unpad: of a padded batch the layers compute the tokens alone, packed into fewer rows whose texts do not see each other.

ByteTransformer (arXiv 2210.03052) computes nothing for padding; rows of about equal length that hold several prompts, with positions that
begin anew, are those of Prepacking (arXiv 2404.09529). Exact for every token: norms, projections and feed-forward blocks know no rows
beside their own, and attention sees the tokens of the row's own text. Where the batch has padding, numbers differ from a model's that
computes it; nobody is meant to read those.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import sympy
from pydantic import Field

from sparsify.planning.method import Context, PaddedSite, Pass, Proposal, Refusal, SiteKind


class Unpad(Pass):
    name: ClassVar[str] = "unpad"
    lossy: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("batch",)

    when: Literal["pays", "always", "never"] = Field(
        "pays", description="whether a padded batch is packed where that is expected to save `least`, always, or never"
    )
    least: float = Field(0.05, ge=0, lt=1, description="share of the padded batch's expected time that packing must save, under `pays`")

    def propose(self, site: PaddedSite, context: Context) -> Proposal | Refusal:
        if self.when == "never":
            return self.refuse('when = "never"')
        packed = site.layer_seconds(context.device, site.rows, site.length) + site.packing_seconds(context.device)
        padded = site.layer_seconds(context.device, site.batch, site.columns)
        if self.when == "pays" and packed > (1 - self.least) * padded:
            what = f"{site.tokens} of {site.batch} × {site.columns} are tokens: packing is expected to save {1 - packed / padded:.0%}"
            return self.refuse(what, 'when = "always" packs them')
        note = f"exact; {site.tokens} tokens of {site.batch} × {site.columns} in {site.rows} × {site.length}"
        return Proposal(self, sympy.Float(packed), note=note)
