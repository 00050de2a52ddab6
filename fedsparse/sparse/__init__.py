"""Masks, blocks, the knapsack, compact layers and the wire codec. Torch and numpy only."""
