"""Exercises of notebook 05: the stub is not done, the solution in the last hint passes,
a wrong answer is told what is wrong.
"""

import nbformat
import pandas as pd
import pytest
import torch

from fakit import Features, LayerMap, Objective, capture, shrink
from tests.families import batch, tiny
from tests.notebooks.cells import NOTEBOOKS, assert_ladder, assert_told, exercise, solution

TEACHER, KEPT = 7_615_616_512, 1_089_994_752  # Qwen2.5-7B: all parameters; those of embeddings and head
L = 3
KNOWN = {"torch": torch, "linear": TEACHER - KEPT, "kept": KEPT}


def planted() -> dict:
    """What the cells with the bug define, as the notebook shows them."""
    cells = {
        cell.id: cell.source for cell in nbformat.read(NOTEBOOKS / "05_gpu_distillation.ipynb", as_version=4).cells
    }
    namespace = {"torch": torch, "pd": pd, "capture": capture, "shrink": shrink, "Objective": Objective}
    namespace |= {"Features": Features, "LayerMap": LayerMap, "SEED": 0, "L": L}
    namespace |= {"full": tiny("bert"), "batches": [batch(rows=4, seed=seed) for seed in (1, 2)]}
    for name in ("s05-bug", "s05-bug-loop"):
        exec(cells[name], namespace)
    return namespace


PLANTED = planted()


@pytest.mark.parametrize("name", ["gigabytes", "error", "optimizer"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("05", name, KNOWN)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (TEACHER / 1e9, "one byte for every parameter"),
        (2 * TEACHER / 1e9, "the teacher in bf16"),
        ((TEACHER + KEPT) / 2**30, "right in GiB"),
        (4.4, "first hint"),
    ],
)
def test_bytes_that_are_not_right(answer, message):
    assert_told(exercise("05", "gigabytes"), answer, message)


def ratio(ours, full):
    return (ours - full).norm() / full.norm()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ours, full, mask: ratio(ours, full), "counts the padding, too"),
        (lambda ours, full, mask: ratio(ours[mask], full[mask]) ** 2, "squared ratio"),
        (lambda ours, full, mask: (ours - full)[mask].norm(), "relative to what"),
        (lambda ours, full, mask: ratio(full[mask], ours[mask]), "relative to the full teacher"),
        (
            lambda ours, full, mask: ((ours - full)[mask].norm(dim=-1) / full[mask].norm(dim=-1)).mean(),
            "a mean of ratios",
        ),
        (lambda ours, full, mask: 0.5, "first hint"),
    ],
)
def test_errors_that_are_not_right(answer, message):
    assert_told(exercise("05", "error"), answer, message)


def test_the_planted_loop_learns_and_its_projection_does_not():
    losses, moved = PLANTED["loop_by_hand"](PLANTED["optimizer_by_hand"])
    assert losses[-1] < losses[0]
    assert moved["projection"] == 0 < moved["student"]
    repaired, moved = PLANTED["loop_by_hand"](solution(exercise("05", "optimizer"), KNOWN))
    assert moved["projection"] > 0 and repaired[-1] < losses[-1]


def prepared(objective) -> None:
    objective.prepare(16, 32)


def adam(*models):
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-3)


def students_alone(student, teacher, objective):
    prepared(objective)
    return adam(student)


def projections_alone(student, teacher, objective):
    prepared(objective)
    return adam(objective)


def teacher_too(student, teacher, objective):
    prepared(objective)
    return adam(student, objective, teacher)


def nothing_returned(student, teacher, objective):
    prepared(objective)
    adam(student, objective)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (PLANTED["optimizer_by_hand"], "made one line too late"),
        (students_alone, "no group of the optimizer holds it"),
        (projections_alone, "the student stands still"),
        (lambda student, teacher, objective: adam(student, objective), "there is no projection yet"),
        (teacher_too, "a teacher is read, never trained"),
        (nothing_returned, "returns NoneType"),
    ],
)
def test_optimizers_that_leave_something_out(answer, message):
    assert_told(exercise("05", "optimizer"), answer, message)
