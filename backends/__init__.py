"""What runs the ops of `sparsify.ops`. Importing this package registers them."""

from sparsify.backends.launch import available, use

__all__ = ["available", "use"]
