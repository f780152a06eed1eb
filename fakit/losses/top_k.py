"""Divergences from a teacher of whom only the k largest probabilities are known, and the mass of the rest.

Both sides are compared over k + 1 classes: the teacher's k largest, and one that stands for all others. With p_r and
q_r the masses of the rest, forward KL becomes

    KL_{k+1} = Σ_{i ≤ k} p_i log(p_i / q_i) + p_r log(p_r / q_r)  ≤  KL(P ‖ Q)

and so do all f-divergences: joining classes never raises one (data-processing inequality), and each is 0 where the two
agree. Nothing is made up about the rest: the student is told how much mass it has there, and not how it is spread.
The bound is an equality where both spread the rest alike, and where k = V. What is left out of forward KL,

    KL(P ‖ Q) - KL_{k+1} = p_r KL(P_rest ‖ Q_rest)  ≤  p_r (log(q_r / min_rest q) - log max(1, p_r / p_k))

as no class of the rest has more than the k-th (`excess_at_most`); of total variation it is at most min(p_r, q_r).

| loss | from the k largest |
|---|---|
| forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd | over k + 1 classes: a lower bound |
| neg_log_acceptance, lk_hybrid | over k + 1 classes: a lower bound, as they rise with total variation (and KL) |
| akl | no: where its head ends may lie inside of the rest |
| taid | no: its mixture of logits spreads the rest anew |
| dkd | no: the label may lie in the rest |
| rlkd | no: it ranks the student's likeliest classes by the teacher, and they may lie in the rest |
| uld, logit_mse | no: they compare the rest one by one |

At a temperature τ the k + 1 probabilities are those of softmax(z / τ), for which the mass of the rest at τ must be
known: it is no function of that at temperature 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fakit.losses.kl import lowest
from fakit.losses.reduce import at_least_float32

SERVED = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "neg_log_acceptance",
    # λ KL + (1 - λ) TV rises with TV: its slope is (1 - λ) + ηλ (KL - TV) >= 0, as KL >= 2 TV² and λ = exp(-η (1 - TV))
    "lk_hybrid",
)
"""The losses of the kit that compare over k + 1 classes."""


@dataclass(frozen=True)
class TopK:
    """The k largest of each of many distributions over `classes`, k < classes.

    Attributes:
        values: log-probabilities at temperature 1, (..., k); NaN where a distribution is not known.
        indices: of which classes, int64 (..., k).
        rest: {τ: log Σ_rest p^(1/τ)}, (...) each: at τ = 1 the log of the mass of all others.
        classes: V.
    """

    values: Tensor
    indices: Tensor
    rest: Mapping[float, Tensor]
    classes: int

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TopK":
        """The same with each tensor (..., ·) changed, such as moved or detached."""
        rest = {tau: change(x) for tau, x in self.rest.items()}
        return replace(self, values=change(self.values), indices=change(self.indices), rest=rest)

    def rest_at(self, temperature: float) -> Tensor:
        """log Σ_rest p^(1/τ). (...)

        Raises:
            ValueError: a temperature at which it was not stored.
        """
        if temperature not in self.rest:
            raise ValueError(
                f"temperature {temperature} was requested, and of the {self.k} largest logits the mass of the rest is "
                f"known at {', '.join(map(str, self.rest))}: it does not follow from that at another temperature. Use "
                "one of these, build the cache with this one (temperatures=…), or keep all logits (top_k=None)."
            )
        return self.rest[temperature]


def buckets(student: Tensor, top: TopK, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both sides as logits of k + 1 classes, the last of them the rest, for a loss that divides them by τ.
    (..., V) -> (..., k + 1) twice; the student's with graph.

    Raises:
        ValueError: shapes that do not fit, or a temperature at which the rest is not known.

    >>> teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> top = TopK(teacher[:, :1], torch.tensor([[0]]), {1.0: teacher[:, 1:].logsumexp(-1)}, 3)
    >>> [x.softmax(-1).round(decimals=4).tolist() for x in buckets(torch.zeros(1, 3), top)]
    [[[0.3333, 0.6667]], [[0.5, 0.5]]]
    """
    if student.shape[:-1] != top.values.shape[:-1] or student.shape[-1] != top.classes:
        raise ValueError(
            f"the {top.k} largest of {top.classes} logits are known at positions {tuple(top.values.shape[:-1])}; the "
            f"student's logits are {tuple(student.shape)}, whose last dimension is the vocabulary. Both sides must be "
            "given the same batch and have one vocabulary."
        )
    rest = top.rest_at(temperature)
    student = at_least_float32(student)
    student = student.clamp_min(lowest(student.dtype))
    kept = student.gather(-1, top.indices)  # (..., k)
    others = (student / temperature).scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    ours = torch.cat([kept, temperature * others], -1)
    theirs = torch.cat([top.values, temperature * rest.unsqueeze(-1)], -1)
    return ours, theirs


def excess_at_most(student: Tensor, top: TopK, temperature: float = 1.0) -> Tensor:
    """What KL(P ‖ Q) may exceed the KL over k + 1 classes by, at each position, without τ². (..., V) -> (...)

    p_r (log(q_r / min_rest q) - log max(1, p_r / p_k)): the cross-entropy within the rest is at most that of its
    unlikeliest class, and its entropy at least log(p_r / p_k), as no class there has more than p_k.
    """
    ours, theirs = (z.double() / temperature for z in buckets(student, top, temperature))
    mass = theirs.log_softmax(-1)[..., -1].exp()
    z = (student.double() / temperature).scatter(-1, top.indices, torch.inf).amin(-1)
    smallest = theirs[..., :-1].amin(-1)
    return mass * (ours[..., -1] - z - (theirs[..., -1] - smallest).clamp_min(0))
