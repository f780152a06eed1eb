"""The method that the kit is named after (Wang et al. 2024, arXiv 2412.19449)."""

from fakit.recipes.recipe import Recipe


def feature_alignment() -> Recipe:
    """Features, attention and outputs beside the task, all weights 1: the kit's own defaults."""
    return Recipe(
        name="feature_alignment",
        title="Feature Alignment-Based Knowledge Distillation for Efficient Compression of Large Language Models",
        source="Wang et al. 2024, arXiv 2412.19449",
        equation=r"""L = \alpha \, \mathrm{mean}_{(j, g)} \| f_j(H^S_j) - H^T_g \|^2
            + \beta \, \mathrm{mean}_{(j, g)} \mathrm{KL}(A^T_g \| A^S_j)
            + \gamma \, \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + \delta \, \mathrm{CE}(y, Q)""",
        settings={
            "layer_map": "uniform",
            "features": {"loss": "mse", "weight": 1.0},
            "attention": {"loss": "kl", "weight": 1.0},
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0},
            "task_weight": 1.0,
        },
        ours=(
            "all weights, the temperature, the layer map, KL between attention maps and the linear projection: of the "
            "paper the abstract was read, which names the terms and none of these",
        ),
        evidence="data/recorded/glosses: the terms against each other, with seeds and intervals.",
    )
