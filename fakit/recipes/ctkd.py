"""CTKD (Li et al., AAAI 2023, arXiv 2211.16231)."""

from fakit.recipes.recipe import Recipe


def ctkd() -> Recipe:
    """Soft labels whose temperature is learned against the student, ever more so."""
    return Recipe(
        name="ctkd",
        title="Curriculum Temperature for Knowledge Distillation",
        source="Li et al., AAAI 2023, arXiv 2211.16231, and its code",
        equation=r"""\min_\theta \max_\phi \; \tau_\phi^2 \, \mathrm{KL}(P_{\tau_\phi} \| Q_{\tau_\phi}) + \mathrm{CE},
            \quad \tau_\phi = \tau_0 + 20 \, \sigma(\phi)""",
        settings={
            "outputs": {
                "loss": "forward_kl",
                "temperature": 1.0,
                "temperature_range": 20.0,
                "reversal": {"from": 0.0, "to": 1.0, "kind": "cosine"},
                "weight": 1.0,
            },
            "task_weight": 1.0,
        },
        published={"λ": "rises over 10 of 240 epochs, and then stays"},
        ours=(
            "the global form, one temperature for all texts",
            "λ rises over the whole training",
            "both weights 1",
        ),
    )
