"""Speed beside accuracy: scripts that measure sparsify and its peers and append JSON lines to benchmarks/results."""
