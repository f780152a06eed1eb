"""ALP-KD (Passban et al., AAAI 2021, arXiv 2012.14022)."""

from fakit.recipes.recipe import Recipe


def alp_kd() -> Recipe:
    """Every student layer learns from all teacher layers, most from those that are closest."""
    return Recipe(
        name="alp_kd",
        title="ALP-KD: Attention-Based Layer Projection for Knowledge Distillation",
        source="Passban et al., AAAI 2021, arXiv 2012.14022",
        equation=r"""L = \mathrm{mean}_j \, \mathrm{MSE} \Big( H^S_j, \sum_t a_{jt} H^T_t \Big)
            + \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + \mathrm{CE}, \quad
            a_j = \mathrm{softmax}_t(H^S_j \cdot H^T_t / d)""",
        settings={
            "layer_map": "every",
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0},
            "task_weight": 1.0,
            "terms": {"layers": {"kind": "layer_attention", "loss": "mse", "weight": 1.0}},
        },
        ours=(
            "its form, from memory of the paper",
            "each token attends for itself (theirs: the first)",
            "the scale 1/d",
            "all weights and the temperature",
        ),
    )
