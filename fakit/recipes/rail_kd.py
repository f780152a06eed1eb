"""RAIL-KD (Haidar et al., Findings of NAACL 2022, arXiv 2109.10164)."""

from fakit.recipes.recipe import Recipe


def rail_kd() -> Recipe:
    """Teacher layers drawn anew each epoch, in their order."""
    return Recipe(
        name="rail_kd",
        title="RAIL-KD: RAndom Intermediate Layer Mapping for Knowledge Distillation",
        source="Haidar et al., Findings of NAACL 2022, arXiv 2109.10164",
        equation=r"""L = \mathrm{mean}_j \| u^S_j - u^T_{g(j)} \|^2
            + \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + \mathrm{CE}, \quad
            u = \bar{h} / \| \bar{h} \|, \; g \text{ random and rising}""",
        settings={
            "layer_map": "random",
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0},
            "task_weight": 1.0,
            "terms": {"layers": {"kind": "pooled", "loss": "normalized_mse", "pool": "mean", "weight": 1.0}},
        },
        ours=(
            "its form, from memory of the paper",
            "all weights and the temperature",
            "no learned projections at equal width",
        ),
    )
