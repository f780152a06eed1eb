"""Layer reduction of sentence encoders (sentence-transformers, Reimers and Gurevych 2019)."""

from fakit.recipes.recipe import Recipe


def layer_reduction() -> Recipe:
    """The texts' vectors alone: the mean of the last hidden states, matched by MSE."""
    return Recipe(
        name="layer_reduction",
        title="Sentence embedding models with fewer layers",
        source="sentence-transformers, examples of model distillation (Reimers and Gurevych 2019, arXiv 1908.10084)",
        equation=r"L = \mathrm{MSE}(\bar{h}^S W, \bar{h}^T), \quad \bar{h} \text{ the mean over a text's tokens}",
        settings={
            "layer_map": "top",
            "terms": {"texts": {"kind": "pooled", "loss": "mse", "pool": "mean", "weight": 1.0}},
        },
        published={"student": "some layers of the teacher, as 1, 4, 7 and 10 of 12", "data": "texts without labels"},
        ours=("a learned projection where widths differ, in place of PCA of the teacher's vectors",),
        evidence="STSb, 12 layers to 8, 6, 4, 3, 2, 1: 85.44 to 85.54, 85.23, 84.92, 84.39, 83.32, 80.86.",
    )
