"""Smaller models from a trained one: pairs of thin matrices in place of its linear layers, and fewer layers.

from fakit.compression import low_rank, layerwise
"""
