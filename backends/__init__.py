"""What runs the ops of `sparsify.ops.attention`. Importing this package registers them."""

import sparsify.backends.ffn.dispatch
import sparsify.backends.sparse_attention  # noqa: F401  (registers selection and attention in one)
from sparsify.backends.dispatch import attention_family, available, serving, strict, use

__all__ = ["attention_family", "available", "serving", "strict", "use"]
