"""Ranking: does the student put the classes that matter in the teacher's order?

RLKD (Peng & Zhang, COLING 2025, arXiv 2409.12545). Per position, with k classes at the top of either side,

    K = topk(P, k) ∪ topk(Q, k)        L_rank = 1 - Spearman(softrank(z_S[K]), softrank(z_T[K]))

and beside a divergence L = 2 L_rank + L_out, or with the dynamic factor L = 2 L_rank + |topk(P, k) ∩ topk(Q, k)|/k ·
L_out. The released code ranks logits, as here, by the soft ranks of Blondel et al. (ICML 2020, arXiv 2002.08871) at
strength 1; it takes one union for a whole batch, in which classes may stand twice, and here every position has its own.

`fakit.evaluation.fidelity` measures what this trains: CR@k and MOR@k.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fakit.losses.divergences import PLAIN
from fakit.losses.logits import mean_over_positions


def soft_rank(values: Tensor, strength: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Differentiable ranks of the last dimension, 1 for the smallest: the vector nearest to values/strength in the
    convex hull of all orders of (1, …, n) (Blondel et al. 2020, with the squared norm). (..., n) -> (..., n), float64

    Values at least `strength` apart from their neighbors get their whole ranks, and no gradient; those closer together
    share theirs, by how close they are. As strength grows, the ranks become a linear function of the values.

    With s the sorted values and w = (n, …, 1), the nearest vector is s - v, v the non-increasing vector nearest to s -
    w, and v_i = min_{j ≤ i} max_{l ≥ i} mean(s - w)[j … l].

    Args:
        valid: bool (..., n), which of the values take part; others are given 0, and n is the number of those that do.

    >>> soft_rank(torch.tensor([7.0, -3.0, 2.0])).tolist()
    [3.0, 1.0, 2.0]
    >>> soft_rank(torch.tensor([0.5, 0.0, 3.0])).tolist()  # the first two are closer than 1
    [1.75, 1.25, 3.0]
    """
    if not 0 < strength < float("inf"):
        raise ValueError(f"soft_rank wants a finite strength above 0, not {strength!r}; 1 is the paper's.")
    n = values.shape[-1]
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    x = values.double().masked_fill(~valid, -torch.inf)
    # only distances count, and none beyond n · strength; sums of 1e37 would swallow the others
    x = (x - x.detach().amax(-1, keepdim=True)).clamp_min(-1e6) / strength
    s, order = x.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True)
    count = valid.sum(-1, keepdim=True)
    w = count - torch.arange(n, device=x.device)  # count, …, 1, then what takes no part
    taken = w > 0
    y = s.masked_fill(~taken, 0.0) - w
    sums = pad(y.cumsum(-1), (1, 0))
    lengths = torch.arange(n, device=x.device) - torch.arange(n, device=x.device).unsqueeze(-1) + 1  # (j, l)
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / lengths.clamp_min(1)  # (..., j, l)
    means = means.masked_fill((lengths < 1) | ~taken.unsqueeze(-2), -torch.inf)
    highest = means.flip(-1).cummax(-1).values.flip(-1)  # (..., j, i): over l ≥ i
    v = highest.masked_fill(lengths < 1, torch.inf).amin(-2)  # over j ≤ i
    ranks = torch.where(taken, s - v, 0.0)
    return torch.zeros_like(ranks).scatter(-1, order, ranks)


def rank_distance(student: Tensor, teacher: Tensor, k: int = 5, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """1 - Spearman over the union of both top k, and which share of the top k they have in common. (..., V) -> (...)

    It is ½‖r_S - r_T‖² of the soft ranks, each with mean 0 and length 1. A side that ranks all of them the same has
    length 0: ½, and 0 where both do.
    """
    k = min(k, student.shape[-1])
    ours, theirs = student.topk(k, -1).indices, teacher.topk(k, -1).indices  # (..., k)
    common = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)  # (..., k), of the student's
    union = torch.cat([theirs, ours], -1)  # (..., 2k)
    valid = torch.cat([torch.ones_like(common), ~common], -1)
    middle = (valid.sum(-1, keepdim=True) + 1) / 2
    directions = []
    for z in (student, teacher):
        ranks = (soft_rank(z.gather(-1, union), strength, valid) - middle).masked_fill(~valid, 0.0)
        length = torch.linalg.vector_norm(ranks, dim=-1, keepdim=True)
        directions.append(ranks / torch.where(length > 1e-9, length, 1.0))
    distance = (directions[0] - directions[1]).square().sum(-1) / 2
    return distance.to(student.dtype), common.sum(-1).to(student.dtype) / k


def per_position(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor = 1.0,
    k: int = 5,
    strength: float = 1.0,
    divergence: str | None = None,
    dynamic: bool = False,
) -> Tensor:
    """`rlkd` at one position, from logits divided by τ and before τ². (..., V) -> (...)

    `temperature`: a number, (), or (..., 1), one a position.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 2:
        raise ValueError(f"rlkd ranks the top k of both sides, k a whole number of 2 at least; k is {k!r}.")
    if not 0 < strength < float("inf"):
        raise ValueError(f"rlkd wants a finite strength above 0, not {strength!r}; 1 is the paper's.")
    if divergence is not None and divergence not in PLAIN:
        raise ValueError(f"rlkd(divergence={divergence!r}) is not known; choose one of {', '.join(PLAIN)}, or None.")
    if dynamic and divergence is None:
        raise ValueError("rlkd(dynamic=True) weighs the divergence beside the ranking, and none is named: divergence=…")
    if student.shape[-1] < 3:
        raise ValueError(
            f"rlkd ranks 3 classes at least, and these logits have {student.shape[-1]}: two have one order or the "
            "other, which has no gradient. Use a divergence, such as forward_kl."
        )
    distance, overlap = rank_distance(student * temperature, teacher * temperature, k, strength)
    squared = temperature**2
    distance = distance / (squared.reshape(-1) if isinstance(squared, Tensor) else squared)  # τ² is the caller's
    if divergence is None:
        return distance
    beside = PLAIN[divergence](student, teacher)
    return 2 * distance + (overlap * beside if dynamic else beside)


def rlkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    k: int = 5,
    strength: float = 1.0,
    divergence: str | None = None,
    dynamic: bool = False,
) -> Tensor:
    """1 - Spearman of the soft ranks over the union of both sides' k likeliest classes, the mean over positions.

    0 where the order is the same, 1 where there is none, 2 where it is reversed. Nothing else counts: classes outside
    of the union, a number added to all logits, and distances of `strength` and more change nothing.

    Args:
        student, teacher: logits (B, T, V) or (B, C) of 3 classes at least.
        mask: bool (B, T) or (B,); None counts all.
        temperature: τ of the divergence beside; the ranking is of the logits as they are.
        k: of either side; all classes where there are fewer. The paper takes 5 beside a divergence, 10 to 15 alone.
        strength: of the soft ranks, in the units of the logits: see `soft_rank`.
        divergence: the name of one that stands beside: 2 L_rank + L_out.
        dynamic: weigh L_out at each position with the share of the top k that both have: 2 L_rank + |∩|/k · L_out.
            Where the student is far off, the ranking comes first.

    Raises:
        ValueError: k, strength or divergence out of range, fewer than 3 classes, shapes that differ.

    >>> teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> rlkd(10 * teacher, teacher).item(), round(rlkd(-teacher, teacher).item(), 6)
    (0.0, 2.0)
    """
    settings = {"k": k, "strength": strength, "divergence": divergence, "dynamic": dynamic}
    return mean_over_positions("rlkd", per_position, student, teacher, mask, temperature, **settings)
