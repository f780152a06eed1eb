"""Jasper (Zhang et al. 2024, arXiv 2412.19048)."""

from fakit.recipes.recipe import Recipe


def jasper() -> Recipe:
    """The texts' vectors, how they lie to each other, and in what order."""
    texts = {"kind": "pooled", "pool": "mean", "layer_map": "top"}
    return Recipe(
        name="jasper",
        title="Jasper and Stella: distillation of SOTA embedding models",
        source="Zhang et al. 2024, arXiv 2412.19048, and its code",
        equation=r"""L = 10 \, (1 - \cos(\bar{h}^S, \bar{h}^T)) + 200 \, \| C^S - C^T \|^2 / n^2
            + 20 \, \mathrm{rank}_{0.015}(C^S, C^T), \quad C_{ij} = \cos(\bar{h}_i, \bar{h}_j)""",
        settings={
            "terms": {
                "texts": {**texts, "loss": "cosine", "weight": 10.0},
                "similarity": {**texts, "loss": "similarity", "weight": 200.0},
                "ranking": {**texts, "loss": "margin_ranking", "margin": 0.015, "weight": 20.0},
            }
        },
        published={"stages": "first the cosine alone, then all three, over Matryoshka prefixes of the vectors"},
        ours=("all three from the start", "whole vectors; prefixes: [256, 512] over prefixes"),
    )
