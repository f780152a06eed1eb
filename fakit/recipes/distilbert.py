"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108)."""

from fakit.recipes.recipe import Recipe


def distilbert() -> Recipe:
    """Soft labels, the task, and the direction of the last hidden states."""
    return Recipe(
        name="distilbert",
        title="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        source="Sanh et al. 2019, arXiv 1910.01108",
        equation=r"L = 5 \, \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + 2 \, L_{mlm} + (1 - \cos(H^S_S, H^T_T))",
        settings={
            "layer_map": "top",
            "features": {"loss": "cosine", "weight": 1.0},
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 5.0},
            "task_weight": 2.0,
        },
        published={"student": "half the layers, every second one copied from the teacher"},
        ours=("the task at hand in place of masked language modeling",),
        evidence="6 of BERT-base's 12 layers: GLUE test mean 76.8 of 79.5.",
    )
