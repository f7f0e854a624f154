"""How many tokens are drafted before each verification: the share that is kept, measured while running, against predicted seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sparsify.costs import device as costs_device
from sparsify.costs import seconds, work
from sparsify.costs.sizes import AttentionSizes
from sparsify.generation.caches.drafting import MOST

# lengths that are tried: each verification of another length is a CUDA graph of its own
LENGTHS = (1, 2, 3, 4, 6, 8, 11, MOST)
# what is taken for known before anything was verified: so many tokens, of which this share was kept
_PRIOR_TOKENS, _PRIOR_SHARE = 4.0, 0.8
# weight of what was measured a token ago
_MEMORY = 0.98
# where no draft pays, one token is drafted after so many, to see whether that has changed
_PROBE = 32


@dataclass(frozen=True)
class Line:
    """Seconds that grow evenly with the tokens that are stored: base + slope * tokens."""

    base: float
    slope: float

    def at(self, tokens: int) -> float:
        return self.base + self.slope * tokens


@dataclass(frozen=True)
class Seconds:
    """What a model's calls are expected to take.

    draft: one drafted token.
    verify: by number of drafted tokens, the call that computes them with the token before them; 0: a token alone.
    """

    draft: Line
    verify: dict[int, Line]


def predicted(model: Any, cache: Any, rows: int) -> Seconds:
    """Seconds of drafts and verifications by the cost model: every weight read once a call, or its products where these take longer; keys
    and values of all layers; launches.

    Args:
        model: a transformers model.
        cache: a SparseCache that drafts.
        rows: sequences side by side.
    """
    config = model.config.get_text_config(decoder=True)
    device = costs_device.describe(model.device)
    dtype = model.dtype
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    looked_up = 0 if embedding is None or (head is not None and head.weight is embedding.weight) else embedding.weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - looked_up
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers, pages = len(cache.layers), cache.draft

    def products(tokens: int) -> float:
        size = work.Work("stream", dtype, size=_number(weights * dtype.itemsize))
        flops = work.Work("linear", dtype, flops=_number(2 * weights * tokens))
        small = layers * seconds.SMALL_KERNELS * device.launch
        return max(float(seconds.seconds(size, device)), float(seconds.seconds(flops, device))) + small

    def attention(works: Any, length: int, tokens: int) -> float:
        sizes = AttentionSizes(rows, heads, kv_heads, 1, length, head_dim, head_dim, dtype)
        read = float(seconds.seconds(works(sizes), device))
        flops = work.Work("linear", dtype, flops=_number(4 * rows * heads * tokens * length * head_dim))
        return layers * max(read, float(seconds.seconds(flops, device)))

    waited = seconds.STEP_LAUNCHES * device.launch
    exact = lambda sizes: (work.decode(sizes, "cache"),)
    drafts = _line(lambda length: products(rows) + attention(lambda sizes: work.page_reading(sizes, pages), length, 1))
    verify = {
        count: _line(lambda length, count=count: products(rows * (count + 1)) + attention(exact, length, count + 1) + waited)
        for count in (0, *range(1, MOST + 1))
    }
    return Seconds(drafts, verify)


def _number(value: float) -> Any:
    return sympy.sympify(value)


def _line(at: Any, near: int = 16384, far: int = 131072) -> Line:
    """Through two lengths, beyond which keys and values take time in proportion to their number."""
    slope = (at(far) - at(near)) / (far - near)
    return Line(at(near) - slope * near, slope)


class DraftLength:
    """Chooses a length for every round of one generation. It depends on what was verified and on predictions, never on a clock, so that
    the same call drafts the same tokens, in all processes that share a model too.

    Args:
        seconds: predicted.
        fixed: tokens that the user asks for; None: what is expected to give most tokens a second.
    """

    def __init__(self, seconds: Seconds, fixed: int | None = None):
        self.seconds, self.fixed = seconds, fixed
        self.tried, self.kept = _PRIOR_TOKENS, _PRIOR_TOKENS * _PRIOR_SHARE
        self._plain = 0  # tokens since the last draft

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that are kept, of those that stand behind none that was not."""
        return self.kept / self.tried

    def tokens_a_second(self, drafts: int, stored: int) -> float:
        """Expected; drafts = 0: without any."""
        share = self.acceptance
        tokens = sum(share**place for place in range(drafts + 1))
        return tokens / max(drafts * self.seconds.draft.at(stored) + self.seconds.verify[drafts].at(stored), 1e-12)

    def choose(self, stored: int, most: int) -> int:
        """Tokens to draft; 0: none.

        Args:
            stored: tokens of a row that the cache holds.
            most: that there may be.
        """
        if self.fixed is not None:
            return min(self.fixed, most)
        best = max((0, *(length for length in LENGTHS if length <= most)), key=lambda drafts: self.tokens_a_second(drafts, stored))
        if best == 0 and most > 0:
            self._plain += 1
            if self._plain >= _PROBE:
                best = 1
        if best:
            self._plain = 0
        return best

    def learn(self, drafts: int, kept: int) -> None:
        """After a verification: so many of the drafts were kept."""
        tried = min(kept + 1, drafts)
        fading = _MEMORY**tried
        self.tried, self.kept = self.tried * fading + tried, self.kept * fading + kept
