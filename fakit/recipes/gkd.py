"""Generalized knowledge distillation (Agarwal et al., ICLR 2024, arXiv 2306.13649)."""

from fakit.recipes.recipe import Recipe


def gkd(beta: float = 0.5) -> Recipe:
    """A divergence between forward and reverse KL, on the texts at hand.

    Args:
        beta: 0 < β < 1, towards 0 forward KL, towards 1 reverse KL.
    """
    return Recipe(
        name="gkd",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        source="Agarwal et al., ICLR 2024, arXiv 2306.13649",
        equation=r"""L = \beta \, \mathrm{KL}(P \| M) + (1 - \beta) \, \mathrm{KL}(Q \| M), \quad
            M = \beta P + (1 - \beta) Q""",
        settings={"outputs": {"loss": "jsd", "beta": beta, "temperature": 1.0, "weight": 1.0}},
        published={
            "β": "0.1, 0.5 and 0.9, by task",
            "texts": "a share λ of them the student's own, 0.5 or 1 for the best results",
        },
        ours=("the texts of the data set (λ = 0); on_policy: {share: 0.5} beside the recipe has the student write",),
    )
