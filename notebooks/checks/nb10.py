"""Checks of the exercises of notebook 10."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fakit.evaluation import ranking_agreement
from fakit.losses.outputs import skew_forward_kl
from fakit.teaching import Exercise, one_of

SKEW_HINT = """```python
def my_skew_kl(student, teacher, mask, alpha):
    p, q = teacher[mask].softmax(-1), student[mask].softmax(-1)
    mixture = alpha * p + (1 - alpha) * q
    return (p * (p.log() - mixture.log())).sum(-1).mean()
```"""

OVERLAP_HINT = """```python
def my_overlap(student, teacher, k):
    ours, theirs = student.topk(k).indices, teacher.topk(k).indices
    common = (ours[:, :, None] == theirs[:, None, :]).any(-1)
    return common.float().mean()
```"""


# -- 10.1 -------------------------------------------------------------------------------------------------------------


def check_skew(answer) -> str | None:
    """Skewed forward KL over three texts of 6, 3 and 1 tokens and 5 classes, at α = 0.3."""
    generator = torch.Generator().manual_seed(10)
    s, t = (2 * torch.randn(3, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [True] + [False] * 5])
    alpha = 0.3
    truth = float(skew_forward_kl(s, t, valid, alpha=alpha))
    found = answer(s.clone(), t.clone(), valid.clone(), alpha)
    if getattr(found, "numel", lambda: 1)() != 1:
        return f"one number is wanted, the mean over positions; yours has shape {tuple(found.shape)}."
    value = float(found)
    if abs(value - truth) > 1e-6:
        known = _wrong_skews(s, t, valid, alpha)
        why = next((why for why, wrong in known.items() if abs(value - wrong) < 1e-6), None)
        return f"your value {value:.4f} {why}." if why else f"your value is {value:.4f}, expected {truth:.4f}."
    s[~valid] = float("nan")
    if not math.isfinite(float(answer(s, t, valid, alpha))):
        return (
            "right, until a padded position holds NaN or infinity: 0 · NaN is NaN. Take the valid positions out by "
            "index instead of multiplying by the mask."
        )
    return None


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def _wrong_skews(s: Tensor, t: Tensor, valid: Tensor, alpha: float) -> dict[str, float]:
    """What is wrong → the value that it makes."""
    p, q = t.softmax(-1), s.softmax(-1)
    mixture = alpha * p + (1 - alpha) * q
    right = _kl(p, mixture)  # (B, T)
    by_text = torch.stack([row[counts].mean() for row, counts in zip(right, valid, strict=True)]).mean()
    wrong = {
        "is plain forward KL: nothing is mixed": _kl(p, q)[valid].mean(),
        "has the shares exchanged: α is the teacher's, 1 − α the student's": _kl(p, alpha * q + (1 - alpha) * p)[
            valid
        ].mean(),
        "goes the other way: the teacher comes first, KL(P ‖ mixture)": _kl(mixture, p)[valid].mean(),
        "is the skewed *reverse* KL, KL(Q ‖ αQ + (1 − α)P)": _kl(q, alpha * q + (1 - alpha) * p)[valid].mean(),
        "is KL(Q ‖ mixture): the teacher comes first": _kl(q, mixture)[valid].mean(),
        "mixes logits: mix the probabilities": _kl(p, (alpha * t + (1 - alpha) * s).softmax(-1))[valid].mean(),
        "does not look at the mask at all": right.mean(),
        "still divides by every position, padding too": (right * valid).mean(),
        "is a mean of text means: a token of a short text weighs more than one of a long text": by_text,
        "is a mean over classes too: a divergence sums over classes": right[valid].mean() / s.shape[-1],
        "is a sum over positions: it grows with batch and length": right[valid].sum(),
        "is upside down: log P − log mixture, not log mixture − log P": -right[valid].mean(),
    }
    return {why: float(value) for why, value in wrong.items()}


skew = Exercise(
    "Write the skewed forward KL, KL(P ‖ αP + (1 − α)Q): summed over classes, averaged over the positions where the "
    "mask is True, whatever padding holds.",
    check_skew,
    hints=[
        "What is mixed are probabilities, not logits. Which positions do you need at all?",
        "`teacher[mask]` is (n, C). Make P and Q of it, then the mixture, then Σ P (log P − log mixture).",
        SKEW_HINT,
    ],
    done="bounded by −log α, whatever the student excludes.",
    number="10.1",
    difficulty=2,
    minutes=8,
)


# -- 10.2 -------------------------------------------------------------------------------------------------------------

ignored = Exercise(
    "Take a teacher and a student with 40 classes, and mark the five likeliest classes of either: six to ten classes. "
    "The student's logits of all *other* classes are now shuffled among each other. Which of these four losses keep "
    "their value, whatever the shuffle: `forward_kl`, `jsd`, `uld`, and `rlkd` with k = 5?\n\n"
    "- a) none of them\n- b) `uld` alone\n- c) `rlkd` alone\n- d) `uld` and `rlkd`",
    one_of(
        {
            "a": "two of them do not look at which class of the tail has which probability.",
            "b": "`uld` does: the sorted probabilities stay the same. But what does `rlkd` see of classes outside of "
            "both top fives?",
            "c": "`rlkd` does: the union of both top fives stays the same. But what do *sorted* probabilities know of "
            "a shuffle?",
            "d": None,
        }
    ),
    hints=[
        "For each loss: does it compare the same class on both sides, or something else?",
        "`uld` sorts each side by itself. `rlkd` takes the union of both top fives, and nothing else.",
        '`my_ignored = "d"`',
    ],
    done="one forgets the names of the classes, the other the tail; the table below shows both.",
    number="10.2",
    difficulty=2,
    minutes=4,
)


# -- 10.3 -------------------------------------------------------------------------------------------------------------


def check_overlap(answer) -> str | None:
    """MOR@3 of six positions with eight classes."""
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k = 3
    truth = float(ranking_agreement(s, t, k)[1].mean())
    found = answer(s.clone(), t.clone(), k)
    if getattr(found, "numel", lambda: 1)() != 1:
        return f"one number is wanted, the mean over positions; yours has shape {tuple(found.shape)}."
    value = float(found)
    if abs(value - truth) < 1e-6:
        return None
    why = next((why for why, wrong in _wrong_overlaps(s, t, k).items() if abs(value - wrong) < 1e-6), None)
    return f"your value {value:.4f} {why}." if why else f"your value is {value:.4f}, expected {truth:.4f}."


def _wrong_overlaps(s: Tensor, t: Tensor, k: int) -> dict[str, float]:
    """What is wrong → the value that it makes."""
    ours, theirs = s.topk(k).indices, t.topk(k).indices
    low = (s.topk(k, largest=False).indices, t.topk(k, largest=False).indices)

    def common(a: Tensor, b: Tensor) -> Tensor:  # (N,)
        return (a[:, :, None] == b[:, None, :]).any(-1).sum(-1).double()

    number = common(ours, theirs)
    batch = len(set(ours.flatten().tolist()) & set(theirs.flatten().tolist()))
    wrong = {
        "asks for the same place, too: MOR@k is about which classes, not about their order": (ours == theirs)
        .double()
        .mean(),
        "is CR@k, all k in the same order": (ours == theirs).all(-1).double().mean(),
        "divides by the union: MOR@k divides by k": (number / (2 * k - number)).mean(),
        "is a count: divide by k": number.mean(),
        "is a sum over positions: take their mean": number.sum() / k,
        "divides by all classes: divide by k": number.mean() / s.shape[-1],
        "is the overlap of the k *least* likely classes": common(*low).mean() / k,
        "takes the top k of all positions together: each position has its own": batch
        / len(set(ours.flatten().tolist()) | set(theirs.flatten().tolist())),
    }
    return {why: float(value) for why, value in wrong.items()}


overlap = Exercise(
    "Write MOR@k: for each position, which share of the teacher's k likeliest classes is among the student's k "
    "likeliest? The mean over positions. Logits are (N, C).",
    check_overlap,
    hints=[
        "`logits.topk(k).indices` is (N, k). The order inside these lists plays no part.",
        "Compare every one of the student's k with every one of the teacher's k: "
        "`ours[:, :, None] == theirs[:, None, :]` is (N, k, k).",
        OVERLAP_HINT,
    ],
    done="it counts names, and knows no order; CR@k is the strict one.",
    number="10.3",
    difficulty=2,
    minutes=6,
)
