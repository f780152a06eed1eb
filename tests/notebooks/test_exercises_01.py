"""Exercises of notebook 01: the stub is not done, the solution in the last hint passes, a wrong answer is told what is wrong."""

import ast
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fakit import LayerMap
from fakit.teaching import Exercise
from fakit.widgets import mapping_board
from tests.notebooks.cells import assert_ladder, assert_told, exercise, source, stub

NOTEBOOK = "01_layer_mapping"
BY_HAND, BUG, MEAN = (f"s07-exercise-{number}" for number in (1, 2, 3))
SIMILARITY = np.random.default_rng(0).uniform(0.1, 0.95, (3, 7))  # no two layer pairs alike


def planted():
    """The function with the bug, as the notebook shows it."""
    found = [
        node
        for node in ast.parse(source(NOTEBOOK, "s07-bug")).body
        if isinstance(node, ast.FunctionDef) and node.name == "uniform_by_hand"
    ]
    namespace = {"LayerMap": LayerMap}
    exec(ast.unparse(found[0]), namespace)
    return namespace["uniform_by_hand"]


# what earlier cells define
KNOWN = {
    **{"torch": torch, "LayerMap": LayerMap, "Exercise": Exercise, "S": 2, "T": 6},
    **{"similarity": SimpleNamespace(values=SIMILARITY), "uniform_by_hand": planted()},
    "my_board": mapping_board(4, 12, start="none"),
}


@pytest.mark.parametrize("cell", [BY_HAND, BUG, MEAN])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(cell):
    assert_ladder(NOTEBOOK, cell, *exercise(NOTEBOOK, cell, KNOWN))


def test_what_is_connected_on_the_board_is_the_answer():
    board = mapping_board(4, 12, start="none")
    task, namespace = exercise(NOTEBOOK, BY_HAND, KNOWN | {"my_board": board})
    for j in (1, 2, 3):
        board.toggle(j, 3 * j)
    assert "yours are [1, 2, 3]" in task.check(stub(NOTEBOOK, BY_HAND, namespace)).message
    board.toggle(4, 12)
    assert task.check(stub(NOTEBOOK, BY_HAND, namespace))


def by_rule(rule):
    """A function (S, T) → map that gives student layer j the teacher layers `rule(j, S, T)`; None leaves it out."""

    def my_uniform(student_layers, teacher_layers):
        pairs = [(j, rule(j, student_layers, teacher_layers)) for j in range(student_layers + 1)]
        return LayerMap([pair for pair in pairs if pair[1] is not None])

    return my_uniform


def blocks(rule):
    """The same for j from 1 on."""
    return by_rule(lambda j, S, T: rule(j, S, T) if j else None)


@pytest.mark.parametrize(
    ("cell", "answer", "message"),
    [
        (BY_HAND, [(0, 3), (1, 6), (2, 9), (3, 12)], "your student layers are 0 to 3"),
        (BY_HAND, [(1, 6), (2, 12)], r"needs one teacher layer; yours are [1, 2]"),
        (BY_HAND, [(1, 4), (2, 7), (3, 10), (4, 13)], "T13 does not exist"),
        (BY_HAND, LayerMap.reverse(4, 12), "that is `reverse`"),
        (BY_HAND, [(1, 1), (2, 4), (3, 7), (4, 10)], "ends two too early"),
        (BY_HAND, LayerMap.first(4, 12), "S4 learns from T4"),
        (BY_HAND, LayerMap.last(4, 12), "evenly spaced means all alike"),
        (BUG, planted(), "that is the function as it was"),
        (BUG, by_rule(lambda j, S, T: j * T // S), "S0 is still there, the embeddings"),
        (BUG, blocks(lambda j, S, T: j * T // S if j < S else None), "S2 has no teacher: `range` stops one before"),
        (BUG, blocks(lambda j, S, T: j * T // S if j > 1 else None), "each block from 1 on needs exactly one"),
        (BUG, blocks(lambda j, S, T: j * T // S + 1), "T7 does not exist"),
        (BUG, blocks(lambda j, S, T: (j - 1) * T // S), "the student counts from 1 now, the teacher still from 0"),
        (BUG, blocks(lambda j, S, T: j), "the last block should learn from the last, T6"),
        (BUG, blocks(lambda j, S, T: T - S + j), "the steps between teacher layers are [5, 1]"),
        (BUG, blocks(lambda j, S, T: 3 * j), "for 3 on 7 layers it gives [(1, 3), (2, 6), (3, 9)]: T9 does not exist"),
        (MEAN, float(SIMILARITY[1, 3] + SIMILARITY[2, 6]) / 2, "the mean of `uniform`"),
        (MEAN, float(SIMILARITY[1, 6] + SIMILARITY[2, 3]), "divide by their number"),
        (MEAN, float(SIMILARITY.mean()), "the whole matrix"),
        (MEAN, float(SIMILARITY[0, 5] + SIMILARITY[1, 2]) / 2, "row and column 0 are the embeddings"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(cell, answer, message):
    assert_told(exercise(NOTEBOOK, cell, KNOWN)[0], answer, message)


@pytest.mark.parametrize("repaired", [LayerMap.uniform, lambda S, T: LayerMap.uniform(S, T).pairs])
def test_other_right_repairs_pass(repaired):
    assert exercise(NOTEBOOK, BUG, KNOWN)[0].check(repaired)


def test_the_planted_bug_is_the_one_that_the_board_warns_of():
    notes = mapping_board(2, 6, start=planted()(2, 6)).notes
    assert notes[0].level == "warning" and notes[0].text.startswith("off by one?")
