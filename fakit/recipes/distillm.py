"""DistiLLM (Ko et al., ICML 2024, arXiv 2402.03898)."""

from fakit.recipes.recipe import Recipe


def distillm(alpha: float = 0.1) -> Recipe:
    """Reverse KL to a mixture that holds some of the student, so that it stays bounded.

    Args:
        alpha: 0 ≤ α < 1, the student's share of the mixture.
    """
    return Recipe(
        name="distillm",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        source="Ko et al., ICML 2024, arXiv 2402.03898",
        equation=r"L = \mathrm{KL}(Q \| \alpha Q + (1 - \alpha) P)",
        settings={"outputs": {"loss": "skew_reverse_kl", "alpha": alpha, "temperature": 1.0, "weight": 1.0}},
        published={"texts": "of the student, more of them as its validation loss rises, from a buffer"},
        ours=(
            "the texts of the data set; on_policy: {share: {from: 0.0, to: 1.0}} beside the recipe has the student "
            "write more and more of them, by the step and without a buffer",
        ),
    )
