"""Distil-Whisper (Gandhi et al. 2023, arXiv 2311.00430)."""

from fakit.recipes.recipe import Recipe


def distil_whisper() -> Recipe:
    """Soft labels and the teacher's own transcripts; no hidden states."""
    return Recipe(
        name="distil_whisper",
        title="Distil-Whisper: Robust Knowledge Distillation via Large-Scale Pseudo Labelling",
        source="Gandhi et al. 2023, arXiv 2311.00430, and its training code",
        equation=r"L = \tau^2 \, \mathrm{KL}(P_\tau \| Q_\tau) + 0.8 \, \mathrm{CE}(\hat{y}, Q)",
        settings={
            "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0},
            "task_weight": 0.8,
        },
        published={
            "student": "the whole encoder, and two decoder layers, the first and the last, copied",
            "labels": "the teacher's transcripts, those with a high error rate left out",
        },
        ours=("the labels of the data set in place of the teacher's transcripts",),
    )
