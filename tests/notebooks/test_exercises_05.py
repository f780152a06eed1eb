"""Exercises of notebook 05: the stub is not done, the solution in the last hint passes,
a wrong answer is told what is wrong.
"""

import ast

import pytest
import torch

from fakit import Features, LayerMap, Objective, capture, shrink
from fakit.evaluation import quantization_fidelity
from fakit.teaching import Exercise
from tests.families import batch, tiny
from tests.notebooks.old_cells import assert_ladder, assert_told, exercise, solution, source

NOTEBOOK = "05_gpu_distillation"
BYTES, ERROR, BUG = (f"s05-exercise-{number}" for number in (1, 2, 3))
TEACHER, KEPT = 7_615_616_512, 1_089_994_752  # Qwen2.5-7B: all parameters; those of embeddings and head
L = 3


def perturbed(size: float):
    """The teacher with noise in its blocks, as rounding leaves it."""
    model = tiny("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.dim() > 1:
                parameter.add_(size * parameter.abs().mean() * torch.randn_like(parameter))
    return model


def planted() -> dict:
    """The functions of the cell with the bug, as the notebook shows them."""
    functions = [node for node in ast.parse(source(NOTEBOOK, "s05-bug")).body if isinstance(node, ast.FunctionDef)]
    namespace = dict(COMMON)
    exec("\n".join(ast.unparse(node) for node in functions), namespace)
    return {node.name: namespace[node.name] for node in functions}


FORMS = {"full": tiny("bert"), "8bit": perturbed(0.02), "4bit": perturbed(0.1)}
BATCHES = [batch(rows=4, seed=seed) for seed in (1, 2)]
with torch.no_grad():
    TARGETS = [capture(FORMS["full"], rows, [L], logits=False) for rows in BATCHES]
COMMON = {
    **{"torch": torch, "capture": capture, "shrink": shrink, "Objective": Objective, "Features": Features},
    **{"LayerMap": LayerMap, "Exercise": Exercise, "quantization_fidelity": quantization_fidelity, "SEED": 0, "L": L},
    **{"forms": FORMS, "batches": BATCHES, "targets": TARGETS, "linear": TEACHER - KEPT, "kept": KEPT},
    **{"count": {"teacher": TEACHER}, "bytes_of_teacher": {"8bit": TEACHER - KEPT + 2 * KEPT}},
    "fidelity": {name: quantization_fidelity(FORMS["full"], FORMS[name], BATCHES) for name in ("8bit", "4bit")},
}
KNOWN = COMMON | planted()


@pytest.mark.parametrize("cell", [BYTES, ERROR, BUG])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(cell):
    assert_ladder(NOTEBOOK, cell, *exercise(NOTEBOOK, cell, KNOWN))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (TEACHER / 1e9, "one byte for every parameter"),
        (2 * TEACHER / 1e9, "the teacher in bf16"),
        ((TEACHER + KEPT) / 2**30, "right in GiB"),
    ],
)
def test_bytes_that_are_not_right(answer, message):
    assert_told(exercise(NOTEBOOK, BYTES, KNOWN)[0], answer, message)


def relative(name: str, padding: bool = False) -> float:
    with torch.no_grad():
        a, b = (capture(FORMS[form], BATCHES[0], [L], logits=False) for form in (name, "full"))
    a, b = (x.hidden_states[L] if padding else x.hidden_states[L][x.mask] for x in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (relative("4bit", padding=True), "counts the padding too"),
        (relative("4bit") ** 2, "squared ratio"),
        (KNOWN["fidelity"]["4bit"][L].relative_error, "over all batches"),
        (relative("8bit"), "the 8-bit teacher's error"),
        (0.5, "first hint"),
    ],
)
def test_errors_that_are_not_right(answer, message):
    assert_told(exercise(NOTEBOOK, ERROR, KNOWN)[0], answer, message)


def test_the_planted_loop_learns_and_its_projection_does_not():
    losses, moved, pull = KNOWN["loop_by_hand"](KNOWN["optimizer_by_hand"])
    assert losses[-1] < losses[0]
    assert moved["projection"] == 0 < pull["projection"] and moved["student"] > 0
    task, namespace = exercise(NOTEBOOK, BUG, KNOWN)
    repaired, moved, _ = KNOWN["loop_by_hand"](solution(task, namespace))
    assert moved["projection"] > 0 and repaired[-1] < losses[-1]


def prepared(objective) -> None:
    objective.prepare(16, 32)


def adam(*models):
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-3)


def students_alone(student, objective):
    prepared(objective)
    return adam(student)


def projections_alone(student, objective):
    prepared(objective)
    return adam(objective)


def teacher_too(student, objective):
    prepared(objective)
    return adam(student, objective, FORMS["full"])


def nothing_returned(student, objective):
    prepared(objective)
    adam(student, objective)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (KNOWN["optimizer_by_hand"], "made one line too late"),
        (students_alone, "no group of the optimizer holds it"),
        (projections_alone, "the student stands still"),
        (lambda student, objective: adam(student, objective), "there is no projection yet"),
        (teacher_too, "a teacher is read, never trained"),
        (nothing_returned, "returns NoneType"),
    ],
)
def test_optimizers_that_leave_something_out(answer, message):
    assert_told(exercise(NOTEBOOK, BUG, KNOWN)[0], answer, message)
