"""What runs the ops of `sparsify.ops`. Importing this package registers them."""

import sparsify.backends.ffn_launch  # registers the feed-forward ops
from sparsify.backends.launch import available, use

__all__ = ["available", "use"]
