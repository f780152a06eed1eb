"""Healing after pruning (MaxText's distillation)."""

from fakit.recipes.recipe import Recipe


def maxtext() -> Recipe:
    """Attention outputs and soft labels that give way to the task."""
    return Recipe(
        name="maxtext",
        title="MaxText: distillation of a pruned model",
        source="MaxText, its distillation trainer and documentation",
        equation=r"""L = \alpha \, \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + (1 - \alpha) \, \mathrm{CE}
            + \beta \, \mathrm{mean}_j (1 - \cos(O^S_j, O^T_{g(j)})), \quad O \text{ the outputs of attention}""",
        settings={
            "layer_map": "uniform",
            "features": {"loss": "cosine", "at": "attention", "weight": {"from": 1.0, "to": 0.1, "kind": "cosine"}},
            "outputs": {
                "loss": "forward_kl",
                "temperature": {"from": 2.0, "to": 1.0, "kind": "cosine"},
                "weight": {"from": 0.9, "to": 0.5, "kind": "cosine"},
            },
            "task_weight": {"from": 0.1, "to": 0.5, "kind": "cosine"},
        },
        published={"β with L2 in place of the cosine": "0.05 to 0.005"},
        ours=("cosine schedules over the whole training",),
    )
