"""Pages of keys: neighbouring slots of a cache of which a token reads those that may matter to it (Quest, arXiv 2406.10774).

For each page the smallest and the largest key number of every channel bound the logit of any of its keys:

    q · k <= sum over channels of max(q * least, q * largest) = max(q, 0) · largest + min(q, 0) · least

Nothing is forgotten: another token may read other pages.

Of a prefix whose keys lie in clusters of a page each, a page counts by the mean of its keys (Squeezed Attention, arXiv 2411.09688).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from sparsify.errors import ConfigError
from sparsify.ops.limits import cdiv

# shares are computed in whole numbers, on every device alike
_PARTS = 10**6
# pages of a group of clusters, whose mean says whether their own are looked at
GROUP = 16


@dataclass(frozen=True)
class Pages:
    """Which pages of each KV head one token reads.

    size: slots of a page: 8, 16, 32 or 64. Bounds take 1 / size of the keys' and values' memory, and every token reads them.
    share: of the pages that hold tokens, those with the highest bounds are read; 1.0 reads all.
    count: how many are read, whatever the share; 0: the share says.
    sinks: pages with one of a row's first tokens are read always, beside the others.
    recent: pages with one of its newest tokens, at least the token's own, likewise.

    Raises:
        ConfigError: a number that makes no sense.
    """

    size: int = 16
    share: float = 0.05
    count: int = 0
    sinks: int = 4
    recent: int = 64

    def __post_init__(self):
        if self.size not in (8, 16, 32, 64):
            raise ConfigError(f"a page has 8, 16, 32 or 64 slots, not {self.size}", where=f"{type(self).__name__}: size")
        if not 0 < self.share <= 1:
            raise ConfigError(f"a share lies above 0 and at most at 1, not {self.share}", where=f"{type(self).__name__}: share")
        for name, least in (("count", 0), ("sinks", 0), ("recent", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"must be at least {least}, not {getattr(self, name)}", where=f"{type(self).__name__}: {name}")

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Pages:
        """What `str` wrote.

        Raises:
            ConfigError: another text.
        """
        given = dict(re.findall(r"(\w+)=(\S+)", text))
        kind = Clusters if "reach" in given else Pages
        if set(given) != {field.name for field in fields(kind)}:
            raise ConfigError(f"not what a Pages writes: {text!r}", where="Pages")
        share = float(given.pop("share"))
        return kind(share=share, **{name: int(number) for name, number in given.items()})

    @property
    def parts(self) -> int:
        """The share in millionths."""
        return max(1, round(self.share * _PARTS))

    def of(self, slots: int) -> int:
        """Pages of so many slots, the last one perhaps not whole."""
        return cdiv(slots, self.size)

    def chosen(self, pages: int) -> int:
        """How many of so many pages with tokens are read for their bounds."""
        return min(pages, self.count or cdiv(pages * self.parts, _PARTS))

    def most(self, slots: int, sinks: int, in_order: bool, staged: int = 0) -> int:
        """Pages of `slots` slots that a token reads at most.

        Args:
            sinks: tokens whose pages are read always, where they are more than `self.sinks`.
            staged: slots, side by side from a page's first one on, that are always read.
            in_order: slot n holds token n; otherwise each token that is always read may lie in a page of its own.
        """
        sinks = max(self.sinks, sinks)
        always = cdiv(sinks, self.size) + cdiv(self.recent, self.size) + 1 if in_order else sinks + self.recent
        return max(1, min(self.of(slots), self.chosen(self.of(slots)) + always + cdiv(staged, self.size)))


@dataclass(frozen=True)
class Clusters(Pages):
    """Which pages one token reads of a prefix that `SparseCache.prepare` has put into clusters; what came after it is read whole.

    Before that everything is read.

    size: keys of a cluster, which is a page. Centroids take 1 / size of the keys' memory, and twice that is allocated.
    share: of the pages that hold tokens, those are read whose centroids have the largest products with the query.
    count, sinks: as of other pages.
    recent: newest tokens of the prefix that go into no cluster.
    reach: centroids are looked at of so many times as many pages as are read: of the groups of 16 clusters whose own centroids are best;
        0: all.

    Raises:
        ConfigError: a number that makes no sense.
    """

    reach: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.reach < 0:
            raise ConfigError(f"must be at least 0, not {self.reach}", where=f"{type(self).__name__}: reach")

    @property
    def first(self) -> int:
        """The first page that may be a cluster: before it lie the row's first tokens."""
        return cdiv(self.sinks, self.size)

    @property
    def groups(self) -> Pages | None:
        """How many groups are looked at, as pages that are chosen among as many as there are groups; None: all."""
        if not self.reach:
            return None
        count = cdiv(self.count * self.reach, GROUP)
        return Pages(self.size, min(1.0, self.share * self.reach), count, 0, 1)

    def most(self, slots: int, sinks: int, in_order: bool, staged: int = 0) -> int:
        """All of them, since what came after the prefix is read whole. As of other pages."""
        return max(1, self.of(slots))
