"""sparsify: a torch.compile backend for sparse long context."""

__version__ = "0.1.0"
