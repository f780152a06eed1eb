"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from fakit.recipes.recipe import Recipe


def dkd(alpha: float = 1.0, beta: float = 8.0) -> Recipe:
    """The labeled class and the others apart, the others with a weight of their own.

    Args:
        alpha, beta: of the two parts.
    """
    return Recipe(
        name="dkd",
        title="Decoupled Knowledge Distillation",
        source="Zhao et al., CVPR 2022, arXiv 2203.08679",
        equation=r"L = \mathrm{CE} + \tau^2 (\alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD})",
        settings={
            "outputs": {"loss": "dkd", "alpha": alpha, "beta": beta, "temperature": 4.0, "weight": 1.0},
            "task_weight": 1.0,
        },
        published={"β": "by data set, from 1 to 10", "task": "images"},
    )
