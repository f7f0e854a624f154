"""What runs the ops of `sparsify.ops`. Importing this package registers them."""

import sparsify.backends.divided  # pyright: ignore[reportUnusedImport]  # registers attention
import sparsify.backends.pattern_attention  # pyright: ignore[reportUnusedImport]  # registers columns and diagonals with attention
import sparsify.backends.sparse_attention  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers selection and attention in one, and through it all others
from sparsify.backends.dispatch import attention_family, available, serving, strict, use
from sparsify.ops import dtensors

__all__ = ["attention_family", "available", "serving", "strict", "use"]

dtensors.register()
