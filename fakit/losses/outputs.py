"""Output-distribution matching: does the student answer as the teacher does?

Every function takes student logits and teacher logits, (B, T, V) with mask bool (B, T), or (B, C) with mask bool (B,)
or None, and a temperature τ > 0. P = softmax(z_T/τ) is the teacher, Q = softmax(z_S/τ) the student. The result is the
sum over classes, the mean over valid positions, times τ², which keeps the gradient's size as τ grows (Hinton et al.
2015). 0 where the two agree, for each of them.

| loss | at one position | where it leads |
|---|---|---|
| forward_kl | KL(P ‖ Q) | covers all that the teacher finds possible: start with it |
| reverse_kl | KL(Q ‖ P) | keeps to what the teacher finds likely |
| jsd | β KL(P ‖ M) + (1 - β) KL(Q ‖ M) | between the two, at most ln 2 |
| skew_forward_kl, skew_reverse_kl | KL(P ‖ αP + (1 - α)Q), KL(Q ‖ αQ + (1 - α)P) | as the KLs, at most -ln α |
| akl | forward and reverse KL, by where the gap lies | head and tail at the same pace |
| taid | KL(softmax((1 - t) z_S + t z_T) ‖ Q) | a teacher that moves away from the student |
| dkd | α TCKD + β NCKD | the classes beside the label count by themselves |
| tvd | ½ Σ abs(P - Q) | no class by much; 1 - acceptance of a draft |
| neg_log_acceptance, lk_hybrid | -log Σ min(P, Q); λ KL + (1 - λ) TV | drafts for speculative decoding |
| uld | Σ abs(sort(P) - sort(Q)) | any two vocabularies, class by rank |
| logit_mse | mean of (z_S - z_T)² | the logits themselves; regression |
| rlkd | 1 - Spearman of the top k | the order at the top: `fakit.losses.ranking` |

A logit of -inf takes its class out of the vocabulary (a head padded to a round size, constrained decoding). Out on both
sides, it counts 0 and gets no gradient. Out on one side alone, a divergence that is infinite there (forward KL where Q
= 0 < P, reverse KL where P = 0 < Q, the squared difference) is huge or inf: about 1e37 times the mass in float32. What
is bounded in the table stays so.

`PER_POSITION` holds each formula by itself (`fakit.losses.divergences`), from logits that are already divided by τ to
one number a position; `fakit.losses.fused.chunked` uses the same ones.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from fakit.losses import divergences, ranking
from fakit.losses.logits import GIVEN, asked_of, mean_over_positions
from fakit.losses.ranking import rlkd


def forward_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² Σ P log(P/Q): covers the teacher's whole distribution. Hinton et al. 2015; L_out of arXiv 2412.19449.

    >>> import torch
    >>> forward_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=2.0).item()
    0.0
    """
    return mean_over_positions("forward_kl", divergences.forward_kl, student, teacher, mask, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² Σ Q log(Q/P): the student keeps to what the teacher finds likely. MiniLLM (Gu et al. 2024), token by token."""
    return mean_over_positions("reverse_kl", divergences.reverse_kl, student, teacher, mask, temperature)


def jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """τ² [β KL(P‖M) + (1-β) KL(Q‖M)], M = βP + (1-β)Q: generalized Jensen-Shannon. GKD (Agarwal et al. 2024).

    0 < β < 1; divided by β its limit is forward KL (β → 0), divided by 1-β reverse KL (β → 1).
    """
    return mean_over_positions("jsd", divergences.jsd, student, teacher, mask, temperature, beta=beta)


def skew_forward_kl(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """τ² KL(P ‖ αP + (1-α)Q), 0 ≤ α < 1: forward KL, at most -ln α. DistiLLM (Ko et al., ICML 2024, 2402.03898)."""
    formula = divergences.skew_forward_kl
    return mean_over_positions("skew_forward_kl", formula, student, teacher, mask, temperature, alpha=alpha)


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """τ² KL(Q ‖ αQ + (1-α)P), 0 ≤ α < 1: reverse KL, at most -ln α. DistiLLM (Ko et al., ICML 2024, 2402.03898)."""
    formula = divergences.skew_reverse_kl
    return mean_over_positions("skew_reverse_kl", formula, student, teacher, mask, temperature, alpha=alpha)


def tvd(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² ½ Σ |P - Q|, total variation; f-distill (Wen et al., ACL 2023).

    At τ = 1 it is 1 - α, the share of a draft's tokens that speculative decoding rejects: α = Σ min(P, Q).

    >>> import math, torch
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # (½, ½), (¾, ¼)
    >>> round(tvd(student, teacher).item(), 6)
    0.25
    """
    return mean_over_positions("tvd", divergences.tvd, student, teacher, mask, temperature)


def akl(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, head: float = 0.5
) -> Tensor:
    """τ² [g_h/(g_h + g_t) KL(P‖Q) + g_t/(g_h + g_t) KL(Q‖P)]. Adaptive KL (Wu et al. 2024, arXiv 2404.02657).

    Forward KL fits the classes at the head of the teacher's distribution first, reverse KL those in its tail; each
    counts by where the two models are apart. The head are the teacher's likeliest classes up to a cumulative P of
    `head`, and the likeliest in any case; g_h and g_t are Σ |P - Q| over head and tail, without gradient.
    """
    return mean_over_positions("akl", divergences.akl, student, teacher, mask, temperature, head=head)


def taid(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, t: float = 0.4
) -> Tensor:
    """τ² KL(P_t ‖ Q), P_t = softmax(((1-t) z_S + t z_T)/τ), z_S in it without gradient. TAID (Shing et al., ICLR 2025,
    arXiv 2501.16937).

    t from 0 (nothing to learn) to 1 (forward KL), growing with training; 0.4 is where the paper starts.
    """
    return mean_over_positions("taid", divergences.taid, student, teacher, mask, temperature, t=t)


def dkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """τ² (α TCKD + β NCKD): decoupled KD (Zhao et al., CVPR 2022, arXiv 2203.08679).

    TCKD is the KL of (P_y, 1 - P_y) from (Q_y, 1 - Q_y), y the label; NCKD is the KL over the other classes alone. With
    α = 1 and β = 1 - P_y it would be forward KL, which lets the other classes count less the surer the teacher is.

    Args:
        labels: integers (B, T) or (B,), a class for each position. Positions of -100 are left out, as the task's loss
            leaves them out; where all are, the loss is 0 (with graph).

    Raises:
        ValueError: no labels, or labels that are no classes.
    """
    if labels is None:
        raise ValueError(
            "dkd treats the labeled class apart from the others, and no labels were given: dkd(…, labels=…), integers "
            "of the positions' shape. Without labels, forward_kl compares all classes alike."
        )
    parameters = {"labels": labels, "alpha": alpha, "beta": beta}
    return mean_over_positions("dkd", divergences.dkd, student, teacher, mask, temperature, **parameters)


def uld(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² Σ |sort(P) - sort(Q)|: universal logit distillation (Boizard et al. 2024, arXiv 2402.12030), for any two
    vocabularies (B, T, V_S) and (B, T, V_T); the shorter is filled up with zeros.

    It sees how probabilities fall off and not which classes have them: exchanging classes changes nothing, and 0 does
    not mean that the two agree. `Outputs("uld")` aligns the k-th predicting position of a row with the teacher's k-th.
    """
    return mean_over_positions("uld", divergences.uld, student, teacher, mask, temperature)


def neg_log_acceptance(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """τ² (-log α), α = Σ min(P, Q): the acceptance rate of speculative decoding, with a gradient also where it is
    low: that of total variation over α. LK losses (Samarin et al. 2026, arXiv 2602.23881).
    """
    formula = divergences.neg_log_acceptance
    return mean_over_positions("neg_log_acceptance", formula, student, teacher, mask, temperature)


def lk_hybrid(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, eta: float = 3.0
) -> Tensor:
    """τ² [λ KL(P‖Q) + (1-λ) ½ Σ|P-Q|], λ = exp(-η α), α = Σ min(P, Q) of each position without gradient: from KL to
    the acceptance rate itself, as that grows. LK losses (Samarin et al. 2026, arXiv 2602.23881).
    """
    return mean_over_positions("lk_hybrid", divergences.lk_hybrid, student, teacher, mask, temperature, eta=eta)


def logit_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean over classes of (z_S - z_T)². Kim et al. 2021. τ² cancels against the (1/τ)²,
    so the temperature does not change it.

    The one loss here that a single regression output (B, 1) can have.
    """
    return mean_over_positions("logit_mse", divergences.logit_mse, student, teacher, mask, temperature)


def bernoulli(logits: Tensor) -> Tensor:
    """Logits of C independent labels as C distributions over (yes, no): sigmoid(z) = softmax((z, 0))[0]. (..., C)
    -> (..., C, 2)

    Several labels a text are no distribution over the C classes: a softmax sees no difference between "all three" and
    "none". The functions above, given both sides so, are means over the labels, as the binary cross-entropy of the task
    is; with teacher P and student Q, forward_kl = τ² mean_c [p log(p/q) + (1 - p) log((1 - p)/(1 - q))] with p =
    sigmoid(z_T/τ), q = sigmoid(z_S/τ).

    >>> import torch
    >>> everything, nothing = torch.full((1, 3), 4.0), torch.full((1, 3), -4.0)
    >>> forward_kl(nothing, everything).item(), round(forward_kl(bernoulli(nothing), bernoulli(everything)).item(), 3)
    (0.0, 3.856)
    """
    return torch.stack([logits, torch.zeros_like(logits)], -1)


LOSSES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "logit_mse": logit_mse,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "akl": akl,
    "taid": taid,
    "dkd": dkd,
    "uld": uld,
    "neg_log_acceptance": neg_log_acceptance,
    "lk_hybrid": lk_hybrid,
    "rlkd": rlkd,
}
# (student logits / τ, teacher logits / τ), (..., V) each, without -inf -> (...); τ² and the mean over positions are the
# caller's
PER_POSITION = divergences.PLAIN | {"dkd": divergences.dkd, "uld": divergences.uld, "rlkd": ranking.per_position}
# Over yes and no, each label by itself, these compare nothing: the label's class, the order and the rank of two.
ONE_OF_MANY = ("dkd", "uld", "rlkd")


def per_position(name: str, **parameters: float) -> Callable[..., Tensor]:
    """A formula of `PER_POSITION` with its own parameters set.

    Raises:
        ValueError: no such divergence, or a parameter or a value of one that it does not take.

    >>> import torch
    >>> per_position("jsd", beta=0.1)(torch.zeros(4, 3), torch.zeros(4, 3)).shape
    torch.Size([4])
    """
    if name not in PER_POSITION:
        raise ValueError(f"divergence {name!r} is not known; choose one of {list(PER_POSITION)} or pass a function.")
    formula = PER_POSITION[name]
    if not parameters:
        return formula
    known = {n: p for n, p in list(signature(formula).parameters.items())[2:] if n not in GIVEN}  # after both sides
    if unknown := [key for key in parameters if key not in known]:
        takes = ", ".join(map(str, known.values())) or "none"
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it takes {takes}.")
    formula = partial(formula, **parameters)
    try_out(formula)
    return formula


def try_out(formula: Callable) -> None:
    """Call a loss, or a formula with its parameters set, on almost nothing:
    a value out of its range is refused here, before any work.
    """
    given = {"labels": torch.zeros(1, dtype=torch.long)} if "labels" in asked_of(formula) else {}
    formula(torch.zeros(1, 4), torch.zeros(1, 4), **given)
