"""Exercises of notebook 10: an empty stub is not done yet, the solution passes,
each classic wrong answer is told what is wrong.
"""

import pytest
import torch

from fakit.losses import outputs
from tests.notebooks.cells import assert_ladder, assert_told, exercise


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def mixed(s, t, alpha):
    """KL(P ‖ αP + (1 - α)Q) of every position, (B, T)."""
    p, q = t.softmax(-1), s.softmax(-1)
    return kl(p, alpha * p + (1 - alpha) * q)


def reversed_skew(s, t, m, a):
    return mixed(t, s, a)[m].mean()


def tops(s, t, k, **largest):
    return s.topk(k, **largest).indices, t.topk(k, **largest).indices


def common(s, t, k, **largest):
    """How many of the top k are in both, (N,)."""
    ours, theirs = tops(s, t, k, **largest)
    return (ours[:, :, None] == theirs[:, None, :]).any(-1).sum(-1).double()


def of_the_batch(s, t, k):
    ours, theirs = (set(top.flatten().tolist()) for top in tops(s, t, k))
    return torch.tensor(len(ours & theirs) / len(ours | theirs))


@pytest.mark.parametrize("name", ["skew", "ignored", "overlap"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("10", name, {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, t, m, a: mixed(s, t, 0.0)[m].mean(), "is plain forward KL"),
        (lambda s, t, m, a: mixed(s, t, 1 - a)[m].mean(), "has the shares exchanged"),
        (
            lambda s, t, m, a: kl(a * t.softmax(-1) + (1 - a) * s.softmax(-1), t.softmax(-1))[m].mean(),
            "goes the other way",
        ),
        (reversed_skew, "skewed *reverse* KL"),
        (
            lambda s, t, m, a: kl(s.softmax(-1), a * t.softmax(-1) + (1 - a) * s.softmax(-1))[m].mean(),
            "is KL(Q ‖ mixture)",
        ),
        (lambda s, t, m, a: kl(t.softmax(-1), (a * t + (1 - a) * s).softmax(-1))[m].mean(), "mixes logits"),
        (lambda s, t, m, a: mixed(s, t, a).mean(), "does not look at the mask"),
        (lambda s, t, m, a: (mixed(s, t, a) * m).mean(), "still divides by every position"),
        (
            lambda s, t, m, a: torch.stack([row[k].mean() for row, k in zip(mixed(s, t, a), m, strict=True)]).mean(),
            "a mean of text means",
        ),
        (lambda s, t, m, a: mixed(s, t, a)[m].mean() / s.shape[-1], "a mean over classes too"),
        (lambda s, t, m, a: mixed(s, t, a)[m].sum(), "is a sum over positions"),
        (lambda s, t, m, a: -mixed(s, t, a)[m].mean(), "is upside down"),
        (lambda s, t, m, a: mixed(s, t, a)[m], "one number is wanted"),
        (lambda s, t, m, a: (mixed(s, t, a) * m).sum() / m.sum(), "0 · NaN is NaN"),
        (lambda s, t, m, a: 0.0, "expected"),
    ],
)
def test_a_wrong_skew_is_told_what_is_wrong(answer, message):
    assert_told(exercise("10", "skew"), answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, t, k: (tops(s, t, k)[0] == tops(s, t, k)[1]).double().mean(), "asks for the same place"),
        (lambda s, t, k: (tops(s, t, k)[0] == tops(s, t, k)[1]).all(-1).double().mean(), "is CR@k"),
        (lambda s, t, k: (common(s, t, k) / (2 * k - common(s, t, k))).mean(), "divides by the union"),
        (lambda s, t, k: common(s, t, k).mean(), "is a count"),
        (lambda s, t, k: common(s, t, k).sum() / k, "is a sum over positions"),
        (lambda s, t, k: common(s, t, k).mean() / s.shape[-1], "divides by all classes"),
        (lambda s, t, k: common(s, t, k, largest=False).mean() / k, "*least* likely"),
        (of_the_batch, "all positions together"),
        (lambda s, t, k: common(s, t, k) / k, "one number is wanted"),
        (lambda s, t, k: 2.0, "expected"),
    ],
)
def test_a_wrong_overlap_is_told_what_is_wrong(answer, message):
    assert_told(exercise("10", "overlap"), answer, message)


@pytest.mark.parametrize(("letter", "message"), [("a", "two of them"), ("b", "outside of"), ("c", "*sorted*")])
def test_a_wrong_letter_is_told_what_was_missed(letter, message):
    assert_told(exercise("10", "ignored"), letter, message)
    assert_told(exercise("10", "ignored"), "e", "one letter")


def test_the_right_letter_is_what_the_losses_do():
    """`uld` and `rlkd` keep their value under a shuffle outside of both top fives, `forward_kl` and `jsd` do not."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(2))
    other = torch.tensor(
        sorted(set(range(40)) - set(student.topk(5).indices.tolist() + teacher.topk(5).indices.tolist()))
    )
    shuffled = student.clone()
    shuffled[other] = student[other[torch.randperm(len(other), generator=draw)]]
    kept = {
        name: abs(
            float(outputs.LOSSES[name](z[None], teacher[None]) - outputs.LOSSES[name](student[None], teacher[None]))
        )
        < 1e-9
        for name, z in dict.fromkeys(("forward_kl", "jsd", "uld", "rlkd"), shuffled).items()
    }
    assert [name for name, same in kept.items() if same] == ["uld", "rlkd"]
    assert exercise("10", "ignored").check("d")
