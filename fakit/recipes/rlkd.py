"""Ranking loss (Peng and Zhang, COLING 2025, arXiv 2409.12545)."""

from fakit.recipes.recipe import Recipe


def rlkd(k: int = 5, divergence: str | None = "forward_kl", dynamic: bool = False) -> Recipe:
    """The order of the likeliest classes, twice as much as a divergence.

    Args:
        k: of either side; the paper takes 5 beside a divergence and 10 to 15 alone.
        divergence: what stands beside; None for the ranking alone.
        dynamic: weigh the divergence with the share of the top k that both have.
    """
    beside = {} if divergence is None else {"divergence": divergence, "dynamic": dynamic}
    return Recipe(
        name="rlkd",
        title="Enhancing Knowledge Distillation of Large Language Models through Efficient Ranking-Based Loss",
        source="Peng and Zhang, COLING 2025, arXiv 2409.12545",
        equation=r"""L = 2 \, (1 - \mathrm{Spearman}(r(z_S), r(z_T))) + L_{out}, \quad
            \text{over } \mathrm{top}_k(P) \cup \mathrm{top}_k(Q)""",
        settings={"outputs": {"loss": "rlkd", "k": k, **beside, "temperature": 1.0, "weight": 1.0}},
        ours=("one union for each position, where the released code takes one for a batch",),
        evidence="Llama-2-7B to TinyLlama-1.1B, GSM8K, Dolly and XSum: KL 16.6, 21.8, 28.2 to 21.2, 24.0, 29.1.",
    )
