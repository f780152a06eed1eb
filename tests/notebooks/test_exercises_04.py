"""Exercises of notebook 04: an empty stub is not done yet, the solution passes, each classic wrong answer is told what is wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fakit.losses.features import mse
from fakit.losses.outputs import forward_kl, reverse_kl
from fakit.teaching import Exercise
from tests.notebooks.cells import assert_ladder, assert_told, exercise

# what earlier cells of the notebook define
KNOWN = {"torch": torch, "np": np, "mse": mse, "forward_kl": forward_kl, "Exercise": Exercise}
KL, PADDING, BALANCE = (("04_loss_laboratory", f"s04-ex{number}-check") for number in (1, 2, 3))


def softened(x, tau):
    return x.div(tau).log_softmax(-1)


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def balanced(norms, weights, *, pull=None, on=lambda weight: weight > 0, keep=("task",)):
    pull = weights["task"] * norms["task"] if pull is None else pull
    return {n: pull / norms[n] if on(w) and n not in keep else w for n, w in weights.items()}


@pytest.mark.parametrize("where", [KL, PADDING, BALANCE], ids=lambda where: where[1])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(where):
    assert_ladder(*where, *exercise(*where, KNOWN))


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        (KL, lambda s, t, tau: kl(softened(t, tau), softened(s, tau)).mean(), "lacks τ²"),
        (KL, lambda s, t, tau: reverse_kl(s, t, None, temperature=tau), "the teacher comes first"),
        (KL, lambda s, t, tau: tau**2 * kl(softened(t, tau), softened(s, tau)).sum(), "a sum over sentences"),
        (
            KL,
            lambda s, t, tau: tau**2 * kl(softened(t, tau), softened(s, tau)).mean() / s.shape[-1],
            "a mean over classes too",
        ),
        (KL, lambda s, t, tau: -(tau**2) * (softened(t, tau).exp() * softened(s, tau)).sum(-1).mean(), "cross-entropy"),
        (KL, lambda s, t, tau: tau**2 * kl(softened(t, tau), softened(s, 1)).mean(), "softens the teacher alone"),
        (KL, lambda s, t, tau: tau * kl(softened(t, tau), softened(s, tau)).mean(), "by τ, not by τ²"),
        (KL, lambda s, t, tau: kl(softened(t, 1), softened(s, 1)).mean(), "does not depend on τ"),
        (KL, lambda s, t, tau: torch.tensor(float("nan")), "log_softmax"),
        (PADDING, lambda s, t, m: F.mse_loss(s * m[..., None], t * m[..., None]), "still divides by every position"),
        (PADDING, lambda s, t, m: F.mse_loss(s, t), "does not look at the mask"),
        (
            PADDING,
            lambda s, t, m: torch.stack([(a - b)[k].square().mean() for a, b, k in zip(s, t, m, strict=True)]).mean(),
            "a mean of sentence means",
        ),
        (PADDING, lambda s, t, m: ((s - t).square() * m[..., None]).sum() / m.sum(), "divide by d as well"),
        (PADDING, lambda s, t, m: ((s - t) * m).square().mean(), "gives it a third axis"),
        (
            PADDING,
            lambda s, t, m: ((s - t).square() * m[..., None]).sum() / (m.sum() * s.shape[-1]),
            "0 · NaN is NaN",
        ),
        (
            BALANCE,
            lambda n, w: {k: w["task"] * n[k] / n["task"] if w[k] and k != "task" else w[k] for k in n},
            "upside down",
        ),
        (BALANCE, lambda n, w: balanced(n, w, pull=n["task"], keep=()), "left out the task's own weight"),
        (BALANCE, lambda n, w: balanced(n, w, pull=n["task"]), "left out the task's own weight"),
        (BALANCE, lambda n, w: balanced(n, w, on=lambda weight: True), "you switched it on"),
        (BALANCE, lambda n, w: balanced(n, w, pull=1.0, keep=()), "the task is the reference"),
        (BALANCE, lambda n, w: w, "should be 0.5 · 4.0 = 2.0 each; yours are"),
        (BALANCE, lambda n, w: [1.0] * 4, "return a dictionary"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    assert_told(exercise(*where, KNOWN)[0], answer, message)
