"""What differs between the transformers releases that sparsify supports (5.17 to 5.24). Nothing else may ask for a version."""

from __future__ import annotations

import inspect
from typing import Any


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model takes a cache: `cache` since transformers 5.24, `past_key_values` before that and in code that
    came with a checkpoint."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
