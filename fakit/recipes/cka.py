"""Matching hidden states by CKA (Dasgupta and Cohn, ICLR 2025)."""

from fakit.recipes.recipe import Recipe


def cka() -> Recipe:
    """Hidden states compared by their similarities, so that widths may differ without projections."""
    return Recipe(
        name="cka",
        title="Improving Language Model Distillation through Hidden State Matching",
        source="Dasgupta and Cohn, ICLR 2025",
        equation=r"""L = \mathrm{mean}_j \big( 1 - \sqrt{\mathrm{CKA}(H^S_j, H^T_{g(j)})} \big)
            + \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + \mathrm{CE}""",
        settings={
            "layer_map": "uniform",
            "features": {"loss": "cka_loss", "weight": 1.0},
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0},
            "task_weight": 1.0,
        },
        ours=("all weights and the temperature", "the mean over layers, where the paper sums them"),
    )
