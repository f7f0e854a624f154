"""Assisted decoding over a cache that cannot take drafts back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from sparsify.errors import CacheError


@contextlib.contextmanager
def refused(caplog: pytest.LogCaptureFixture, reason: str) -> Iterator[None]:
    """The block's `generate()` ends, and `reason` was said: transformers asks after the prompt whether the cache can be cropped, and what
    speaks against it is logged; its older releases do not ask, and `crop` raises."""
    with caplog.at_level("INFO"), pytest.raises((ValueError, CacheError), match=r"that can be cropped|is evicted") as found:
        yield
    assert reason in (caplog.text if found.type is ValueError else str(found.value))
