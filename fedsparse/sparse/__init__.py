"""Masks, blocks, the knapsack, compact layers and the wire codec. Torch, numpy and numba only."""

CHOICES = ("auto", "dense", "sparse")
"""How layers under an element mask are computed: see :mod:`fedsparse.sparse.representation`."""

SEARCH_PIECE = 1 << 15
"""Gradients of pruned weights that exist at a time while the largest are searched."""
