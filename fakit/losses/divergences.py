"""Divergences at one position: from the student's and the teacher's logits, already divided by τ, to one number.

Every formula takes (..., V) twice, without -inf, and gives (...). P = softmax(teacher) is the teacher, Q =
softmax(student) the student. Masks, the mean over positions and τ² are `fakit.losses.outputs`'; chunks of tokens are
`fakit.losses.fused.chunked`'s. Both use the formulas here, so that they agree.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fakit.losses.kl import difference, kl, lowest


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P ‖ Q)."""
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Q ‖ P)."""
    return kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = βP + (1 - β)Q."""
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd mixes teacher and student with 0 < beta < 1, not {beta!r}; its limits are forward_kl and reverse_kl."
        )
    return beta * kl(teacher, student, beta) + (1 - beta) * kl(student, teacher, 1 - beta)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(P ‖ αP + (1 - α)Q)."""
    return kl(teacher, student, _share("skew_forward_kl", alpha, "forward_kl"))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(Q ‖ αQ + (1 - α)P)."""
    return kl(student, teacher, _share("skew_reverse_kl", alpha, "reverse_kl"))


def _share(name: str, alpha: float, limit: str) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(
            f"{name} mixes with 0 <= alpha < 1, not {alpha!r}; 0 is {limit}, and at 1 nothing is compared."
        )
    return alpha


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """½ Σ |P - Q| = 1 - Σ min(P, Q)."""
    return difference(teacher, student).abs().sum(-1) / 2


def akl(student: Tensor, teacher: Tensor, head: float = 0.5) -> Tensor:
    """g_h/(g_h + g_t) KL(P ‖ Q) + g_t/(g_h + g_t) KL(Q ‖ P), g_h and g_t the sums of |P - Q| over head and tail."""
    if not 0 < head < 1:
        raise ValueError(
            f"akl takes as head the classes of the first 0 < head < 1 of the teacher's mass, not {head!r}."
        )
    p, order = teacher.softmax(-1).sort(dim=-1, descending=True, stable=True)
    gap = difference(teacher, student).detach().abs().gather(-1, order)
    in_head = p.cumsum(-1) <= head
    in_head[..., 0] = True  # also where the first class has more than that
    g_head, g_all = (gap * in_head).sum(-1), gap.sum(-1)
    forward = torch.where(g_all > 0, g_head / g_all, 0.5)
    return forward * kl(teacher, student) + (1 - forward) * kl(student, teacher)


def taid(student: Tensor, teacher: Tensor, t: float = 0.4) -> Tensor:
    """KL(P_t ‖ Q), P_t = softmax((1 - t) sg(z_S) + t z_T), sg: without gradient."""
    if not 0 <= t <= 1:
        raise ValueError(f"taid goes from the student's logits (t = 0) to the teacher's (t = 1); t is {t!r}.")
    return kl((1 - t) * student.detach() + t * teacher, student)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """α TCKD + β NCKD. labels (...), each a class.

    NCKD = KL(P̂ ‖ Q̂), both without the labeled class y and summing to 1 again. TCKD, the KL of (P_y, 1 - P_y) from (Q_y,
    1 - Q_y), is what it lacks of the whole (equation 7 of the paper): KL(P ‖ Q) = TCKD + (1 - P_y) NCKD.
    """
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0 and math.isfinite(alpha + beta)):
        raise ValueError(
            f"dkd weighs its two parts with alpha, beta >= 0, not both 0; they are {alpha!r} and {beta!r}."
        )
    ours, theirs = (z.scatter(-1, labels.long().unsqueeze(-1), lowest(z.dtype)) for z in (student, teacher))
    others = (theirs.logsumexp(-1) - teacher.logsumexp(-1)).exp()  # 1 - P_y
    nckd = kl(theirs, ours)
    return alpha * (kl(teacher, student) - others * nckd) + beta * nckd


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ |sort(P) - sort(Q)|; the shorter is filled up with zeros. (..., V_S), (..., V_T) -> (...)"""
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (  # a softmax of sorted logits is the sorted softmax
        pad(z.sort(dim=-1, descending=True).values, (0, width - z.shape[-1]), value=lowest(z.dtype))
        for z in (student, teacher)
    )
    return difference(teacher, student).abs().sum(-1)


def neg_log_acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    """-log Σ min(P, Q)."""
    rejected = tvd(student, teacher)
    near = -torch.log1p(-rejected.clamp_max(0.5))
    # of a small sum the logarithm is taken from logarithms: the sum itself may be 0 in float32
    far = -torch.minimum(student.log_softmax(-1), teacher.log_softmax(-1)).logsumexp(-1)
    return torch.where(rejected < 0.5, near, far)


def lk_hybrid(student: Tensor, teacher: Tensor, eta: float = 3.0) -> Tensor:
    """λ KL(P ‖ Q) + (1 - λ) ½ Σ |P - Q|, λ = exp(-η sg(Σ min(P, Q))), sg: without gradient."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"lk_hybrid leaves the KL as fast as a finite eta >= 0 says; it is {eta!r}.")
    rejected = tvd(student, teacher)
    weight = torch.exp(-eta * (1 - rejected.detach()))
    return weight * kl(teacher, student) + (1 - weight) * rejected


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of the squared difference."""
    return (student - teacher).square().mean(-1)


# of those that compare class by class, whatever the label: what a ranking loss may stand beside
PLAIN = {
    formula.__name__: formula
    for formula in (
        forward_kl,
        reverse_kl,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        tvd,
        akl,
        taid,
        neg_log_acceptance,
        lk_hybrid,
        logit_mse,
    )
}
