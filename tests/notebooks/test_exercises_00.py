"""Exercises of notebook 00: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fakit.teaching import Exercise
from tests.notebooks.old_cells import assert_ladder, assert_told, exercise, source

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
    assert_ladder(*where, *exercise(*where, KNOWN))


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
        (WEIGHT, 0.5, "half the weight is not half the total"),
        (WEIGHT, 3.0 / 1.4, "only the *other* terms"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    assert_told(exercise(*where, KNOWN)[0], answer, message)


def test_logits_multiplied_by_the_temperature_are_recognized():
    task, _ = exercise(*TEMPERATURE, KNOWN)
    taus = torch.linspace(0.001, 2, 20_000).double()
    highest = (3 * TEACHER[0].double() * taus[:, None]).softmax(-1).max(-1).values
    assert "you multiply the logits by τ" in task.check(taus[(highest - 0.5).abs().argmin()].item()).message


# the bug to find: a teacher left in train mode

BUG = ("00_start_here", "s10-exercise-4")


def classifier(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return BertForSequenceClassification(config)


@pytest.fixture
def hunt():
    """The exercise with its cell's namespace, as the cells before it leave it: a pair, a batch, the colleague's step."""
    teacher, student = classifier(0).eval().requires_grad_(False), classifier(1).train()
    known = {
        **{"torch": torch, "Exercise": Exercise, "Markdown": str, "teacher": teacher, "student": student},
        "probe": {"input_ids": torch.arange(12).view(3, 4), "labels": torch.zeros(3)},
        "session": SimpleNamespace(device="cpu"),
    }
    known["teacher"].classifier.weight.data.mul_(50)  # with opinions that dropout can change
    exec(source("00_start_here", "s10-bug"), known)
    task, namespace = exercise(*BUG, known)
    return task, namespace


def test_the_bug_found_passes_and_the_stub_is_not_done(hunt):
    task, namespace = hunt
    assert_ladder(*BUG, task, namespace)
    assert namespace["student"].training and not namespace["teacher"].training


def stepped(before, teacher_under=torch.no_grad, student_under=torch.enable_grad, after=lambda pair: None):
    def step(pair, batch):
        pair.train()
        before(pair)
        with teacher_under():
            theirs = pair["teacher"](**batch).logits
        with student_under():
            ours = pair["student"](**batch).logits
        after(pair)
        return ours, theirs

    return step


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (stepped(lambda pair: None), "two answers"),
        (stepped(lambda pair: torch.manual_seed(0)), "a fixed seed repeats the dropout"),
        (stepped(lambda pair: pair.eval()), "the student stands still too"),
        (stepped(lambda pair: pair["teacher"].eval(), student_under=torch.no_grad), "carry no gradient"),
        (
            stepped(lambda pair: pair["teacher"].eval().requires_grad_(), teacher_under=torch.enable_grad),
            "a gradient now",
        ),
        (stepped(lambda pair: pair["teacher"].eval(), after=lambda pair: pair.train()), "left in train mode"),
    ],
)
def test_half_a_repair_is_told_what_is_left(hunt, step, message):
    assert_told(hunt[0], step, message)
