"""The same layers by several estimators: what each would have said."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .results import SimilarityMatrix
from .uncertainty import LayerComparison


def compare_estimators(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    draws: int = 4,
    permutations: int = 100,
    bootstrap: int = 100,
    seed: int = 0,
) -> dict[str, SimilarityMatrix]:
    """CKA of all layer pairs by every estimator of the kit, on the same tokens: short name → matrix,
    the honest one first.

    Args:
        student_layers: tensors (B, T, d) of the same sequences in both models, one a layer.
        teacher_layers: the same for the teacher.
        mask: bool (B, T), True where a token counts.
        draws: tokens kept of each sequence.
        permutations: of whole sequences, for the null bands; of pooled tokens a tenth (but 10, where as many
            were asked), since each costs draws² times more.
        bootstrap: resamples of whole sequences, for the intervals; pooled tokens have none.
        seed: of everything random.
    """
    honest, pooled, standard = (
        LayerComparison(draws, seed, **how).update(student_layers, teacher_layers, mask)
        for how in ({}, {"pooled": True}, {"standardized": True})
    )
    few = min(permutations, max(10, permutations // 10))
    return {
        "debiased": honest.result("debiased", permutations, bootstrap),
        "biased": honest.result("biased", permutations, bootstrap),
        "debiased, tokens pooled": pooled.result("debiased", few, 0),
        "biased, tokens pooled": pooled.result("biased", few, 0),
        "debiased, z-scored": standard.result("debiased", permutations, bootstrap),
        "debiased, RBF kernel": honest.result("debiased", permutations, bootstrap, kernel="rbf"),
    }
