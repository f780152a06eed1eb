"""Exercises of notebook 01: the stub is not done, the solution in the last hint passes,
a wrong answer is told what is wrong.
"""

import ast
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fakit import LayerMap
from fakit.teaching import Exercise
from fakit.widgets import mapping_board
from tests.notebooks.old_cells import assert_ladder, assert_told, exercise, source, stub

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


# of the maps of section 5, the least similar is not the one that taught worst
PAIRS = {"yours": LayerMap.last(2, 6), "uniform": LayerMap.uniform(2, 6), "none": LayerMap.none()}
TAUGHT = {"yours": 0.61, "uniform": 0.62, "none": 0.5}

# what earlier cells define
KNOWN = {
    **{"torch": torch, "LayerMap": LayerMap, "Exercise": Exercise, "S": 2, "T": 6},
    **{"similarity": SimpleNamespace(values=SIMILARITY), "uniform_by_hand": planted()},
    **{"my_board": mapping_board(4, 12, start="none"), "arms": PAIRS, "score": TAUGHT},
    "show": lambda pairs: ", ".join(f"S{s} ← T{t}" for s, t in pairs),
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
        (BUG, planted(), "for 3 on 7 layers it gives [(1, 2), (2, 4), (3, 6)]: as the function did before"),
        (BUG, blocks(lambda j, S, T: j * round(T / S)), "as the function did before"),
        (BUG, blocks(lambda j, S, T: j * -(-T // S)), "T9 does not exist: a step that is rounded up"),
        (
            BUG,
            blocks(lambda j, S, T: T if j == S else j * (T // S)),
            "the steps between teacher layers are [1, 1, 1, 3]",
        ),
        (BUG, by_rule(lambda j, S, T: j * T // S), "S0 is still there, the embeddings"),
        (BUG, blocks(lambda j, S, T: j * T // S if j < S else None), "S2 has no teacher: `range` stops one before"),
        (BUG, blocks(lambda j, S, T: j * T // S if j > 1 else None), "each block from 1 on needs exactly one"),
        (BUG, blocks(lambda j, S, T: (j - 1) * T // S), "the student counts from 1 now, the teacher still from 0"),
        (BUG, blocks(lambda j, S, T: j), "the last block should learn from the last, T6"),
        (BUG, blocks(lambda j, S, T: T - S + j), "the steps between teacher layers are [5, 1]"),
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


def test_the_planted_bug_is_right_where_the_depths_divide_and_only_there():
    by_hand = planted()
    assert all(by_hand(*depths) == LayerMap.uniform(*depths) for depths in ((2, 6), (3, 6), (4, 12)))
    assert by_hand(4, 6) == LayerMap.first(4, 6)
    notes = mapping_board(4, 6, start=by_hand(4, 6)).notes
    assert "T6, which the teacher answers from, teaches nobody" in [note.text for note in notes]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "`{least}` did not teach worst; `{most}` did"),
        ({"least": 0.4}, "`{least}` taught worst, too"),
    ],
)
def test_a_right_mean_is_told_what_section_5_measured(scores, message):
    def mean(name):
        return sum(SIMILARITY[pair] for pair in PAIRS[name].pairs) / 2

    least, most = sorted(("yours", "uniform"), key=mean)
    known = KNOWN | {"score": {least: scores.get("least", 0.62), most: 0.61, "none": 0.5}}
    told = exercise(NOTEBOOK, MEAN, known)[0].done
    assert message.format(least=least, most=most) in told
    assert (
        told.index(f"| {least} |") < told.index(f"| {most} |") and "none" not in told
    )  # a table, the least similar first
    assert f"{mean(least):.2f}" in told and f"{mean(most):.2f}" in told
