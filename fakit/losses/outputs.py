"""Output-distribution matching: does the student answer as the teacher does?

Every function takes student logits and teacher logits, (B, T, V) with mask bool (B, T), or (B, C) with mask bool (B,) or None, and a
temperature τ > 0. P = softmax(z_T/τ) is the teacher, Q = softmax(z_S/τ) the student. The result is the sum over classes, the mean over
valid positions, times τ², which keeps the gradient's size as τ grows (Hinton et al. 2015). 0 where the two agree, for each of them.

A logit of -inf takes its class out of the vocabulary (a head padded to a round size, constrained decoding). Out on both sides, it counts 0
and gets no gradient. Out on one side alone, a divergence that is infinite there (forward KL where Q = 0 < P, reverse KL where P = 0 < Q, the
squared difference) is huge or inf: about 1e37 times the mass in float32. The Jensen-Shannon divergence stays below ln 2.

`PER_POSITION` holds each formula by itself, from logits that are already divided by τ to one number a position; `fakit.losses.chunked` uses
the same ones.
"""

import math

import torch
from torch import Tensor

from fakit.losses.reduce import at_least_float32, check_mask, masked_mean

_FIX = "Different vocabularies: pad-only differences are cut with Outputs(vocab_size=N); different tokenisers cannot be matched token by token."


def _prepare(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.dim() not in (2, 3):
        raise ValueError(
            f"{name} compares logits of one shape, (B, T, V) or (B, C); student has {tuple(student.shape)}, teacher has {tuple(teacher.shape)}. {_FIX}"
        )
    check_mask(name, mask, student.shape[:-1])
    if not isinstance(temperature, Tensor) and not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"{name} wants a finite temperature above 0, not {temperature!r}; 1 leaves the distributions as they are."
        )
    if mask is not None:
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    student, teacher = at_least_float32(student) / temperature, at_least_float32(teacher) / temperature
    return student.clamp_min(lowest(student.dtype)), teacher.clamp_min(lowest(teacher.dtype))


def lowest(dtype: torch.dtype) -> float:
    """What a logit of -inf is replaced by: its probability is 0 all the same, but 0 times it is 0 and not NaN.

    An eighth of the range, so that sums and differences of a few stay finite.
    """
    return torch.finfo(dtype).min / 8


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension. (..., V) -> (...)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def _jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def forward_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² Σ P log(P/Q): covers the teacher's whole distribution. Hinton et al. 2015; L_out of arXiv 2412.19449.

    >>> import torch
    >>> forward_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=2.0).item()
    0.0
    """
    student, teacher = _prepare("forward_kl", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_forward_kl(student, teacher), mask)


def reverse_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """τ² Σ Q log(Q/P): the student keeps to what the teacher finds likely. MiniLLM (Gu et al. 2024), token by token."""
    student, teacher = _prepare("reverse_kl", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_reverse_kl(student, teacher), mask)


def jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """τ² [β KL(P‖M) + (1-β) KL(Q‖M)], M = βP + (1-β)Q: generalised Jensen-Shannon. GKD (Agarwal et al. 2024).

    0 < β < 1; divided by β its limit is forward KL (β → 0), divided by 1-β reverse KL (β → 1).
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd mixes teacher and student with 0 < beta < 1, not {beta!r}; its limits are forward_kl and reverse_kl."
        )
    student, teacher = _prepare("jsd", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_jsd(student, teacher, beta), mask)


def logit_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean over classes of (z_S - z_T)². Kim et al. 2021. τ² cancels against the (1/τ)², so the temperature does not change it.

    The one loss here that a single regression output (B, 1) can have.
    """
    student, teacher = _prepare("logit_mse", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_logit_mse(student, teacher), mask)


LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "logit_mse": logit_mse}

# (student logits / τ, teacher logits / τ), (..., V) each, without -inf -> (...); τ² and the mean over positions are the caller's
PER_POSITION = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "logit_mse": _logit_mse}
