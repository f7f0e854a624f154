"""The custom ops that passes put into graphs and backends serve: schemas and fake kernels only, kernels register from `sparsify.backends`.

attention           attention with every clause that methods may combine on a site
select_blocks       block lists for it, from an estimate of its scores
sparse_attention    both in one call, for block lists that are too large to exist at once
cache_*             an evicting cache: store, attend, decode, length
linear              linear layers of a few rows, with norm, gate or sum
ffn, ffn_start      feed-forward blocks that rows may skip
"""
