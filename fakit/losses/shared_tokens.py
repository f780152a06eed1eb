"""Two vocabularies compared over the tokens that both have.

Both sides become distributions over the n shared tokens and one class that stands for all others, whose mass is that of
the tokens that this side alone has:

    z = (z_shared, τ log Σ_others exp(z / τ))  →  softmax(z / τ) = (p_shared, p_others)

So probabilities stay as they are, and joining classes never raises an f-divergence (as in `fakit.losses.top_k`). Where
one side has no others there is nothing that its mass could be compared with: both are then distributions over the
shared tokens alone.
"""

import torch
from torch import Tensor

from fakit.losses.kl import lowest
from fakit.losses.reduce import at_least_float32
from fakit.losses.top_k import SERVED

__all__ = ["SERVED", "over_shared"]


def over_shared(
    student: Tensor, teacher: Tensor, shared: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Both sides as logits of one vocabulary, for a loss of `SERVED` that divides them by τ. (..., V_S), (..., V_T)
    -> (..., n + 1) twice, or (..., n)

    Args:
        shared: int64 (n, 2), ids of the student and of the teacher, each at most once.

    Raises:
        ValueError: no shared token, or one beyond a vocabulary.

    >>> student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> [z.softmax(-1).tolist() for z in over_shared(student, teacher, torch.tensor([[0, 1]]))]
    [[[0.5, 0.5]], [[0.75, 0.25]]]
    """
    sides = (student, teacher)
    sizes = [z.shape[-1] for z in sides]
    highest = shared.amax(0).tolist() if len(shared) else [-1, -1]
    if not len(shared) or any(number >= size for number, size in zip(highest, sizes, strict=True)):
        raise ValueError(
            f"{len(shared)} tokens are shared, up to {highest[0]} of the student and {highest[1]} of the teacher, and "
            f"their logits have {sizes[0]} and {sizes[1]} entries; give the shared tokens of these vocabularies, or "
            "compare sorted probabilities: Outputs('uld')."
        )
    both = all(size > len(shared) for size in sizes)
    made = []
    for z, ids in zip(sides, shared.to(student.device).unbind(1), strict=True):
        z = at_least_float32(z)
        z = z.clamp_min(lowest(z.dtype))
        kept = z[..., ids]
        if both:
            others = (z / temperature).index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            kept = torch.cat([kept, temperature * others], -1)
        made.append(kept)
    return made[0], made[1]
