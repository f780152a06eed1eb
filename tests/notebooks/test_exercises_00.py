"""Exercises of notebook 00: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

from types import SimpleNamespace

import pytest
import torch

from fakit.teaching import Exercise
from tests.notebooks.cells import exercise, solution, stub

TEACHER, STUDENT = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
RAW = {"features": 0.2, "attention": 0.5, "outputs": 1.4, "task": 0.9}
# what earlier cells of the notebooks define
KNOWN = {
    **{"torch": torch, "Exercise": Exercise, "teacher_logits": 3 * TEACHER},
    **{"ours": SimpleNamespace(logits=STUDENT), "theirs": SimpleNamespace(logits=TEACHER)},
    "after": SimpleNamespace(terms={name: torch.tensor(value) for name, value in RAW.items()}),
}

TEMPERATURE = ("00_start_here", "s10-exercise-1")
OUTPUTS = ("00_start_here", "s10-exercise-2")
WEIGHT = ("00_start_here", "s10-exercise-3")
EVERY = [TEMPERATURE, OUTPUTS, WEIGHT]


@pytest.mark.parametrize("where", EVERY, ids=lambda where: "-".join(where))
def test_the_solution_in_the_hints_passes_and_the_stub_is_not_done(where):
    task, namespace = exercise(*where, KNOWN)
    assert task.check(stub(*where, namespace)).status == "not done yet"
    result = task.check(solution(task, namespace))
    assert result.status == "passes", result


def soft(logits, tau):
    return (logits / tau).softmax(-1)


def forward(student, teacher, tau):
    p, q = soft(teacher, tau), soft(student, tau)
    return (p * (p / q).log()).sum(-1)  # (B,)


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        (TEMPERATURE, 0.01, "more heat"),
        (TEMPERATURE, 1000.0, "less heat"),
        (OUTPUTS, lambda s, t, tau: forward(s, t, tau).mean(), "but for the factor τ²"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(t, s, tau).mean(), "the reverse divergence"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).mean() / s.shape[-1], "divide by the number of labels"),
        (OUTPUTS, lambda s, t, tau: tau**2 * forward(s, t, tau).sum(), "sum over the texts"),
        (
            OUTPUTS,
            lambda s, t, tau: -(tau**2) * (soft(t, tau) * soft(s, tau).log()).sum(-1).mean(),
            "the cross-entropy",
        ),
        (OUTPUTS, lambda s, t, tau: 0.0, "it gives 0.0000"),
        (WEIGHT, 1.4 / 1.6, "that is the inverse"),
        (WEIGHT, 1.0, "47 % of the total"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    result = exercise(*where, KNOWN)[0].check(answer)
    assert result.status == "not right" and message in result.message, result


def test_logits_multiplied_by_the_temperature_are_recognised():
    task, _ = exercise(*TEMPERATURE, KNOWN)
    taus = torch.linspace(0.001, 2, 20_000).double()
    highest = (3 * TEACHER[0].double() * taus[:, None]).softmax(-1).max(-1).values
    assert "you multiply the logits by τ" in task.check(taus[(highest - 0.5).abs().argmin()].item()).message
