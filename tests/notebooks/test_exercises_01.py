"""Exercises of notebook 01: the stub is not done, the solution in the last hint passes,
a wrong answer is told what is wrong.
"""

import nbformat
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fakit import LayerMap
from fakit.widgets import mapping_board
from tests.notebooks.cells import NOTEBOOKS, assert_ladder, assert_told, exercise, stub

NAMES = ("uniform", "monotone", "by_hand", "bug", "mean")
UNIFORM, MONOTONE, BY_HAND, BUG, MEAN = (exercise("01", name) for name in NAMES)


def planted():
    """The function with the bug, as the notebook shows it."""
    cells = nbformat.read(NOTEBOOKS / "01_layer_mapping.ipynb", as_version=4).cells
    (shown,) = (cell.source for cell in cells if cell.id == "s07-bug")
    namespace = {"LayerMap": LayerMap}
    exec(shown, namespace)
    return namespace["uniform_by_hand"]


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("01", name, {"my_board": mapping_board(4, 12, start="none")})


def test_what_is_connected_on_the_board_is_the_answer():
    board = mapping_board(4, 12, start="none")
    for j in (1, 2, 3):
        board.toggle(j, 3 * j)
    assert "yours are [1, 2, 3]" in BY_HAND.check(stub("01", "by_hand", {"my_board": board})).message
    board.toggle(4, 12)
    assert BY_HAND.check(stub("01", "by_hand", {"my_board": board}))


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
    ("task", "answer", "message"),
    [
        (BY_HAND, [(0, 3), (1, 6), (2, 9), (3, 12)], "your student layers are 0 to 3"),
        (BY_HAND, [(1, 6), (2, 12)], r"needs one teacher layer; yours are [1, 2]"),
        (BY_HAND, [(1, 4), (2, 7), (3, 10), (4, 13)], "T13 does not exist"),
        (BY_HAND, LayerMap.reverse(4, 12), "that is `reverse`"),
        (BY_HAND, [(1, 1), (2, 4), (3, 7), (4, 10)], "ends two too early"),
        (BY_HAND, LayerMap.first(4, 12), "S4 learns from T4"),
        (BY_HAND, LayerMap.last(4, 12), "evenly spaced means all alike"),
        (UNIFORM, planted(), "for 3 on 7 layers it gives S1 ← T2, S2 ← T4, S3 ← T6: every step is 2"),
        (UNIFORM, blocks(lambda j, S, T: j * round(T / S)), "every step is 2"),
        (UNIFORM, blocks(lambda j, S, T: j * -(-T // S)), "T9 does not exist: a step that is rounded up"),
        (
            UNIFORM,
            blocks(lambda j, S, T: T if j == S else j * (T // S)),
            "the steps between teacher layers are [1, 1, 1, 3]",
        ),
        (UNIFORM, by_rule(lambda j, S, T: j * T // S), "S0 takes part, the embeddings"),
        (UNIFORM, blocks(lambda j, S, T: j * T // S if j < S else None), "S2 has no teacher: `range` stops one before"),
        (UNIFORM, blocks(lambda j, S, T: j * T // S if j > 1 else None), "each block from 1 on needs exactly one"),
        (UNIFORM, blocks(lambda j, S, T: (j - 1) * T // S), "the student counts from 1, the teacher from 0"),
        (UNIFORM, blocks(lambda j, S, T: j), "the last block should learn from the last, T6"),
        (UNIFORM, blocks(lambda j, S, T: T - S + j), "the steps between teacher layers are [5, 1]"),
        (UNIFORM, LayerMap.reverse, "the last block should learn from the last, T6"),
        (BUG, lambda S, T: True, "for 4 on 6 layers the step is 1, so that S4 learns from T4, which is wrong"),
        (BUG, lambda S, T: T == 2 * S, "for 2 on 6 layers the step is 3, so that S2 learns from T6, which is right"),
        (BUG, lambda S, T: T % 2 == 0, "yours says True"),
        (BUG, lambda S, T: S % T == 0, "you divide the student's depth by the teacher's"),
        (BUG, lambda S, T: T % S, "exactly the wrong way round"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(task, answer, message):
    assert_told(task, answer, message)


@pytest.mark.parametrize("right", [LayerMap.uniform, lambda S, T: [(j, -(-j * T // S)) for j in range(1, S + 1)]])
def test_other_uniform_maps_pass(right):
    assert UNIFORM.check(right)


def test_the_planted_bug_is_right_where_the_depths_divide_and_only_there():
    by_hand = planted()
    assert all(by_hand(*depths) == LayerMap.uniform(*depths) for depths in ((2, 6), (3, 6), (4, 12)))
    assert by_hand(4, 6) == LayerMap.first(4, 6)
    notes = mapping_board(4, 6, start=by_hand(4, 6)).notes
    assert "T6, which the teacher answers from, teaches nobody" in [note.text for note in notes]
    assert BUG.check(lambda S, T: by_hand(S, T).pairs[-1] == (S, T))


# a monotone map from similarity


def argmax(similarity):
    return [(s, 1 + int(row[1:].argmax())) for s, row in enumerate(similarity) if s]


def greedy(similarity):
    pairs, last = [], 0
    S = len(similarity) - 1
    for s in range(1, S + 1):
        room = similarity[s, last + 1 : similarity.shape[1] - (S - s)]
        last += 1 + int(room.argmax())
        pairs.append((s, last))
    return pairs


def not_strictly(similarity):
    """Ties are allowed: the best rising choice with repeats."""
    from itertools import combinations_with_replacement

    S, T = (n - 1 for n in similarity.shape)
    maps = [list(enumerate(chosen, 1)) for chosen in combinations_with_replacement(range(1, T + 1), S)]
    return max(maps, key=lambda pairs: sum(similarity[pair] for pair in pairs))


def assigned(similarity):
    rows, columns = linear_sum_assignment(similarity[1:, 1:], maximize=True)
    return [(s + 1, t + 1) for s, t in zip(rows, columns, strict=True)]


def cut(similarity):
    """The library's map of the matrix without its first row and column, numbered from 0."""
    return [(s - 1, t - 1) for s, t in LayerMap.from_similarity(similarity)]


def whole(similarity):
    """Row and column 0 taken for layer 1."""
    padded = np.pad(similarity, ((1, 0), (1, 0)))
    return LayerMap.from_similarity(padded)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (argmax, "S1 ← T3, S2 ← T3: the best of each row by itself. T3 teaches S1 and S2"),
        (assigned, "The links of S1 and S2 cross"),
        (greedy, "in order, and its sum is 1.00; 1.50 is possible"),
        (not_strictly, "T3 teaches S1 and S2; teacher layers have to rise strictly"),
        (lambda s: LayerMap.first(s.shape[0] - 1, s.shape[1] - 1), "in order, and its sum is 0.80"),
        (cut, "S0 takes part, the embeddings, and the last block does not"),
        (lambda s: [(a, b - 1) for a, b in LayerMap.from_similarity(s)], "every teacher layer is one too low"),
        (whole, "S3 does not exist. Row 0 is the embeddings, not layer 1"),
        (lambda s: [(a - 1, b - 1) for a, b in whole(s)], "S0 takes part: row and column 0 are the embeddings"),
        (lambda s: [(a, b + 1) for a, b in LayerMap.from_similarity(s)], "T5 does not exist. Column 0"),
        (lambda s: [(a, a - 1) for a in range(1, len(s))], "T0 is the embeddings: column 0 is no block"),
        (lambda s: LayerMap.from_similarity(s).pairs[1:], "every student block, 1 to 2, needs exactly one"),
        (lambda s: LayerMap.none(), "it gives no pair: every student block"),
    ],
)
def test_a_map_that_is_not_the_best_is_told_what_is_wrong(answer, message):
    assert_told(MONOTONE, answer, message)


def test_the_librarys_monotone_map_passes():
    assert MONOTONE.check(LayerMap.from_similarity)
    assert MONOTONE.check(lambda s: LayerMap.from_similarity(s).pairs)


def test_crossing_and_missed_sums_are_found_where_repeats_are_not():
    """The first matrix catches an argmax that repeats; the next two, one that crosses, and a greedy choice."""
    from tests.notebooks.cells import checks

    repeats, crosses, misled, _ = checks("01")._SIMILARITIES
    assert len({t for _, t in argmax(repeats)}) < 2
    assert [t for _, t in argmax(crosses)] == sorted((t for _, t in argmax(crosses)), reverse=True)
    assert greedy(misled) != LayerMap.from_similarity(misled).pairs


# how alike are a map's layers?


def mean(values, pairs):
    return float(np.mean([values[pair] for pair in pairs]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda values, chosen: mean(values, LayerMap.uniform(2, 6)), "the mean of `uniform`"),
        (lambda values, chosen: sum(values[pair] for pair in chosen), "divide by their number"),
        (lambda values, chosen: values.mean(), "the whole matrix"),
        (
            lambda values, chosen: mean(values, [(s - 1, t - 1) for s, t in chosen]),
            "row and column 0 are the embeddings",
        ),
        (lambda values, chosen: sum(values[pair] for pair in chosen) / 2, "divide by the number of student layers"),
        (lambda values, chosen: 2.0, "of the check's matrix it gives 2.000"),
    ],
)
def test_a_wrong_mean_is_told_what_is_wrong(answer, message):
    assert_told(MEAN, answer, message)
