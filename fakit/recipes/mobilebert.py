"""MobileBERT (Sun et al., ACL 2020, arXiv 2004.02984)."""

from fakit.recipes.recipe import Recipe


def mobilebert() -> Recipe:
    """Normalized hidden states with their means and variances, attention maps, and half soft labels, half the task."""
    return Recipe(
        name="mobilebert",
        title="MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices",
        source="Sun et al., ACL 2020, arXiv 2004.02984, and its released code",
        equation=r"""L = \mathrm{mean}_j \big( 100 \, \| \mathrm{LN}(H^S_j) - \mathrm{LN}(H^T_g) \|^2 / d
            + 5000 \, (\mu^S - \mu^T)^2 + 5 \, |v^S - v^T| + \mathrm{KL}(A^T_g \| A^S_j) \big)
            + \tfrac{1}{2} \mathrm{KL}(P \| Q) + \tfrac{1}{2} L_{mlm}""",
        settings={
            "layer_map": "uniform",
            "features": {"loss": "mobilebert", "weight": 1.0},
            "attention": {"loss": "kl", "weight": 1.0},
            "outputs": {"loss": "forward_kl", "temperature": 1.0, "weight": 0.5},
            "task_weight": 0.5,
        },
        published={
            "student": "as many layers as the teacher, narrower inside, so that no projection is needed",
            "progressive transfer": "one layer after the other before the soft labels; it was the best of three orders",
        },
        ours=(
            "all terms at once, which the paper calls auxiliary knowledge transfer",
            "a uniform layer map for students of fewer layers",
            "the task at hand in place of masked language modeling and next-sentence prediction",
        ),
    )
