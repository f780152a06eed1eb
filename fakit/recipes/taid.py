"""TAID (Shing et al., ICLR 2025, arXiv 2501.16937)."""

from fakit.recipes.recipe import Recipe


def taid(start: float = 0.4) -> Recipe:
    """A teacher that starts near the student and moves away from it.

    Args:
        start: t at the first step; it rises to 1, the teacher itself, at the last.
    """
    return Recipe(
        name="taid",
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        source="Shing et al., ICLR 2025, arXiv 2501.16937",
        equation=r"L = \mathrm{KL}(P_t \| Q), \quad P_t = \mathrm{softmax}((1 - t) \, \mathrm{sg}(z_S) + t \, z_T)",
        settings={
            "outputs": {
                "loss": "taid",
                "t": {"from": start, "to": 1.0, "kind": "linear"},
                "temperature": 1.0,
                "weight": 1.0,
            }
        },
        published={"t": "from 0.4 at least linearly to 1, faster where the loss falls faster"},
        ours=("t rises linearly with the steps",),
    )
