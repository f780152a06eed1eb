"""Exercises of notebook 04: an empty stub is not done yet, the solution passes,
each classic wrong answer is told what is wrong.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.notebooks.cells import assert_ladder, assert_told, exercise

PULL, PADDING, BALANCE = "pull", "padding", "balance"


def gap(student, teacher, tau=1.0, tau_of_teacher=None):
    """softmax(student / τ) − softmax(teacher / τ), over the number of texts:
    the gradient of the KL for logits that are divided already.
    """
    own, other = student.div(tau), teacher.div(tau_of_teacher or tau)
    return (own.softmax(-1) - other.softmax(-1)) / len(student)


def balanced(norms, weights, *, pull=None, on=lambda weight: weight > 0, keep=("task",)):
    pull = weights["task"] * norms["task"] if pull is None else pull
    return {n: pull / norms[n] if on(w) and n not in keep else w for n, w in weights.items()}


@pytest.mark.parametrize("name", [PULL, PADDING, BALANCE])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("04", name, {})


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (PULL, lambda s, t, tau: -tau * gap(s, t, tau), "points the other way"),
        (PULL, lambda s, t, tau: tau * len(s) * gap(s, t, tau), "a sum over texts"),
        (PULL, lambda s, t, tau: gap(s, t, tau), "lacks a factor"),
        (PULL, lambda s, t, tau: tau**2 * gap(s, t, tau), "takes one τ back"),
        (PULL, lambda s, t, tau: gap(s, t, tau) / tau, "without its τ²"),
        (PULL, lambda s, t, tau: tau * gap(s, t), "softens nothing"),
        (PULL, lambda s, t, tau: tau * gap(s, t, 1.0, tau), "softens the teacher alone"),
        (PULL, lambda s, t, tau: tau * gap(s, t, tau) / s.shape[-1], "a mean over classes too"),
        (PULL, lambda s, t, tau: gap(s, t, tau).norm(), "one number for each logit"),
        (PULL, lambda s, t, tau: s / 0, "not finite"),
        (PULL, lambda s, t, tau: torch.zeros_like(s), "off by up to"),
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
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, message):
    assert_told(exercise("04", name), answer, message)
