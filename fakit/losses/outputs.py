"""Output-distribution matching: does the student answer as the teacher does?

Every function takes student logits and teacher logits, (B, T, V) with mask bool (B, T), or (B, C) with mask bool (B,)
or None, and a temperature τ > 0. P = softmax(z_T/τ) is the teacher, Q = softmax(z_S/τ) the student. The result is the
sum over classes, the mean over valid positions, times τ², which keeps the gradient's size as τ grows (Hinton et al.
2015). 0 where the two agree, for each of them.

A logit of -inf takes its class out of the vocabulary (a head padded to a round size, constrained decoding). Out on both
sides, it counts 0 and gets no gradient. Out on one side alone, a divergence that is infinite there (forward KL where Q
= 0 < P, reverse KL where P = 0 < Q, the squared difference) is huge or inf: about 1e37 times the mass in float32. The
Jensen-Shannon divergence stays below ln 2.

`PER_POSITION` holds each formula by itself, from logits that are already divided by τ to one number a position;
`fakit.losses.fused.chunked` uses the same ones.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from fakit.losses.reduce import at_least_float32, check_mask, masked_mean, values_known

_FIX = (
    "Different vocabularies: pad-only differences are cut with Outputs(vocab_size=N); different tokenizers cannot be "
    "matched token by token."
)


def _prepare(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.dim() not in (2, 3):
        raise ValueError(
            f"{name} compares logits of one shape, (B, T, V) or (B, C); student has {tuple(student.shape)}, teacher "
            f"has {tuple(teacher.shape)}. {_FIX}"
        )
    check_mask(name, mask, student.shape[:-1])
    check_temperature(name, temperature)
    if mask is not None:
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    student, teacher = at_least_float32(student) / temperature, at_least_float32(teacher) / temperature
    dtype = torch.promote_types(student.dtype, teacher.dtype)  # float64 where one side is
    student, teacher = student.to(dtype), teacher.to(dtype)
    return student.clamp_min(lowest(student.dtype)), teacher.clamp_min(lowest(teacher.dtype))


def check_temperature(name: str, temperature: float | Tensor) -> None:
    """Raise ValueError unless the temperature is a tensor, or a finite number above 0."""
    if not isinstance(temperature, Tensor) and not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"{name} wants a finite temperature above 0, not {temperature!r}; 1 leaves the distributions as they are."
        )


def check_vocabularies(student: int, teacher: int, vocab_size: int | None) -> None:
    """Raise ValueError unless `vocab_size` entries are in both vocabularies, or, where it is None, both have one size.

    Args:
        student, teacher: numbers of entries of the logits.
    """
    if vocab_size is None and student != teacher:
        raise ValueError(
            f"vocabulary sizes differ: the student's logits have {student} entries, the teacher's {teacher}. If one "
            f"head is only padded, Outputs(vocab_size={min(student, teacher)}) cuts both to the shared true "
            "vocabulary; if the tokenizers differ, outputs cannot be matched token by token."
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size={vocab_size} entries are not in both vocabularies: the student has {student}, the teacher "
            f"{teacher}."
        )


def lowest(dtype: torch.dtype) -> float:
    """What a logit of -inf is replaced by: its probability is 0 all the same, but 0 times it is 0 and not NaN.

    An eighth of the range, so that sums and differences of a few stay finite.
    """
    return torch.finfo(dtype).min / 8


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) over the last dimension, also where the two hardly differ. (..., V)
    -> (...)
    """
    return _KL.apply(teacher, student)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, student):
        log_p, u = _log_ratio(teacher, student)
        p = log_p.exp()
        values = small_kl(-(p * u).sum(-1), p, u, lambda rows: student.flatten(0, -2)[rows].softmax(-1))
        ctx.save_for_backward(teacher, student, values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        teacher, student, values = ctx.saved_tensors
        log_p, u = _log_ratio(teacher, student)
        p, gradient, values = log_p.exp(), gradient.unsqueeze(-1), values.unsqueeze(-1)
        u = u - ((p * u).sum(-1, keepdim=True) + values)  # Σ p u = -KL, so what all u are wrong by is known
        to_student = torch.where(u.abs() < 1, p * torch.expm1(u.clamp(-1, 1)), (log_p + u).exp() - p)  # q - p
        return -gradient * p * (u + values), gradient * to_student


def _log_ratio(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """log p and u = log q - log p, the logits subtracted first:
    logarithms of small probabilities would swallow their difference.
    """
    above = [z.logsumexp(-1, keepdim=True) for z in (teacher, student)]
    return teacher - above[0], (student - teacher) - (above[1] - above[0])


# Below it a KL is summed up anew: in float32 Σ p (log p - log q) is right to some 1e-6 over a large vocabulary, however
# small it is itself.
_SMALL = 0.03
# Elements of one block of the sum; its few intermediate results stay in a CPU's caches.
_BLOCK = 2**17


def small_kl(values: Tensor, p: Tensor, u: Tensor, q_of: Callable) -> Tensor:
    """KL divergences, the small ones computed anew without cancellation.

    With v = u - Σ p u and φ(v) = eᵛ - 1 - v ≥ 0, KL(p ‖ q) = log(1 + Σ p φ(v)): every summand is small where the KL is,
    and a number that is added to all u, such as the error of a log-sum-exp, changes nothing.

    Args:
        values: (...), Σ -p u.
        p, u: (..., V), u = log q - log p.
        q_of: gives q, the rows counted over all leading dimensions, of those that a slice selects.
    """
    if not values_known(values):
        anew = _around_zero(p.flatten(0, -2), u.flatten(0, -2), q_of, slice(None)).view(values.shape)
        return torch.where(values < _SMALL, anew, values)
    shape, values, p, u = values.shape, values.flatten(), p.reshape(-1, p.shape[-1]), u.reshape(-1, u.shape[-1])
    step = max(1, _BLOCK // p.shape[-1])
    for start in range(0, len(p), step):
        rows = slice(start, start + step)
        small = values[rows] < _SMALL
        if small.any():
            values[rows] = torch.where(small, _around_zero(p[rows], u[rows], q_of, rows), values[rows])
    return values.view(shape)


def _around_zero(p: Tensor, u: Tensor, q_of: Callable, rows: slice) -> Tensor:
    """log(1 + Σ p φ(v)): φ by its series near 0, where the difference would cancel; by q where eᵛ would overflow.
    (n, V) -> (n,)
    """
    mean = torch.linalg.vecdot(p, u).unsqueeze(-1)
    v = u - mean
    near = torch.finfo(u.dtype).eps ** 0.25
    low, high = (x.item() for x in v.aminmax()) if values_known(v) else (-math.inf, math.inf)
    if max(-low, high) < near:
        return torch.linalg.vecdot(p, _series(v)).log1p()
    if high < 20 and p.shape[-1] > 1000:  # what cancels in one of so many summands is nothing in their sum
        return torch.linalg.vecdot(p, torch.expm1(v).sub_(v)).log1p()
    w = v.clamp_max(20.0)
    phi = torch.where(v.abs() < near, _series(v.clamp(-near, near)), torch.expm1(w) - w)
    return torch.where(v > 20, q_of(rows) * torch.exp(-mean) - p - p * v, p * phi).sum(-1).log1p()


def _series(v: Tensor) -> Tensor:
    """eᵛ - 1 - v = v²/2 + v³/6 + v⁴/24 + v⁵/120 + …"""
    return v.div(120).add_(1 / 24).mul_(v).add_(1 / 6).mul_(v).add_(1 / 2).mul_(v).mul_(v)


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher, student)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(student, teacher)


def _jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd mixes teacher and student with 0 < beta < 1, not {beta!r}; its limits are forward_kl and reverse_kl."
        )
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
    """τ² [β KL(P‖M) + (1-β) KL(Q‖M)], M = βP + (1-β)Q: generalized Jensen-Shannon. GKD (Agarwal et al. 2024).

    0 < β < 1; divided by β its limit is forward KL (β → 0), divided by 1-β reverse KL (β → 1).
    """
    student, teacher = _prepare("jsd", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_jsd(student, teacher, beta), mask)


def logit_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean over classes of (z_S - z_T)². Kim et al. 2021. τ² cancels against the (1/τ)²,
    so the temperature does not change it.

    The one loss here that a single regression output (B, 1) can have.
    """
    student, teacher = _prepare("logit_mse", student, teacher, mask, temperature)
    return temperature**2 * masked_mean(_logit_mse(student, teacher), mask)


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


LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "logit_mse": logit_mse}

# (student logits / τ, teacher logits / τ), (..., V) each, without -inf -> (...); τ² and the mean over positions are the
# caller's
PER_POSITION = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "logit_mse": _logit_mse}


def per_position(name: str, **parameters: float) -> Callable[[Tensor, Tensor], Tensor]:
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
    known = dict(list(signature(formula).parameters.items())[2:])  # after student and teacher
    if unknown := [key for key in parameters if key not in known]:
        takes = ", ".join(map(str, known.values())) or "none"
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it takes {takes}.")
    formula = partial(formula, **parameters)
    formula(torch.zeros(1, 2), torch.zeros(1, 2))  # a value out of its range is refused here, before any work
    return formula
