"""Drafts for speculative decoding (LK losses, Samarin et al. 2026, arXiv 2602.23881)."""

from fakit.recipes.recipe import Recipe


def draft(eta: float = 3.0) -> Recipe:
    """From KL to the acceptance rate itself, as that grows.

    Args:
        eta: how fast; λ = exp(-η · acceptance) is the share of KL.
    """
    return Recipe(
        name="draft",
        title="LK losses: training drafts for their acceptance rate",
        source="Samarin et al. 2026, arXiv 2602.23881",
        equation=r"""L = \lambda \, \mathrm{KL}(P \| Q) + (1 - \lambda) \, \tfrac{1}{2} \sum |P - Q|, \quad
            \lambda = e^{-\eta \, \mathrm{sg}(\sum \min(P, Q))}""",
        settings={"outputs": {"loss": "lk_hybrid", "eta": eta, "temperature": 1.0, "weight": 1.0}},
        ours=("a whole student as the draft, where the paper trains draft heads",),
    )
