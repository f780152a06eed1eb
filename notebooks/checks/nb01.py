"""Exercises of notebook 01."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np

from fakit import LayerMap
from fakit.teaching import Exercise

Pairs = list[tuple[int, int]]


def _pairs(answer: LayerMap | Iterable[Sequence[int]]) -> Pairs:
    """The pairs of a map, or of a list of pairs, sorted."""
    return sorted((int(s), int(t)) for s, t in answer)


def _sides(pairs: Pairs) -> tuple[list[int], list[int]]:
    return [s for s, _ in pairs], [t for _, t in pairs]


def _shown(pairs: Pairs) -> str:
    return ", ".join(f"S{s} ← T{t}" for s, t in pairs) or "no pair"


# -- 01.1: a uniform map ----------------------------------------------------------------------------------------------


def _check_uniform(function) -> str | None:
    for depths in ((2, 6), (4, 12), (3, 7), (4, 6), (1, 5), (5, 5)):
        student_layers, teacher_layers = depths
        pairs = _pairs(function(*depths))
        students, teachers = _sides(pairs)
        gaps = [b - a for a, b in pairwise([0, *teachers])]
        case = f"for {student_layers} on {teacher_layers} layers it gives {_shown(pairs)}: "
        if 0 in students:
            return case + "S0 takes part, the embeddings. The blocks are 1 to the student's depth."
        if students == list(range(1, student_layers)):
            return case + f"S{student_layers} has no teacher: `range` stops one before its second argument."
        if students != list(range(1, student_layers + 1)):
            return case + "each block from 1 on needs exactly one teacher layer."
        step = teacher_layers // student_layers
        if teacher_layers % student_layers and teachers == [j * step for j in students]:
            return (
                case + f"every step is {step}, the rest of {teacher_layers} ÷ {student_layers} is lost. When to round?"
            )
        if max(teachers) > teacher_layers:
            return case + f"T{max(teachers)} does not exist: a step that is rounded up walks off the end."
        if teachers[0] == 0:
            return case + "the student counts from 1, the teacher from 0, which is the embeddings."
        if teachers[-1] != teacher_layers:
            return case + f"the last block should learn from the last, T{teacher_layers}."
        if max(gaps) - min(gaps) > 1 or min(gaps) < 0:
            return case + (
                f"the steps between teacher layers are {gaps}; evenly spaced means alike, or one apart where they do "
                "not divide."
            )
    return None


uniform = Exercise(
    "Write `my_uniform`: for a student of S and a teacher of T layers, a list of pairs (student layer, teacher layer). "
    "Every student block 1 … S learns from one teacher layer, the last from the last, and the teacher layers are "
    "evenly spaced, the embeddings (0) being where counting starts. Where S does not divide T, steps may differ by "
    "one. It has to be right for **any** two depths.",
    _check_uniform,
    hints=[
        "Do 2 on 6 on paper, then 4 on 6. Which teacher layer is j of S parts along the way to T?",
        "Student layer j stands at j·T/S. Round once, at the end: what a division loses early is multiplied later.",
        """```python
def my_uniform(student_layers, teacher_layers):
    return [(j, j * teacher_layers // student_layers) for j in range(1, student_layers + 1)]
```
Multiply first, divide last. `LayerMap.uniform` rounds where this one cuts; both are evenly spaced.""",
    ],
    done="the last learns from the last, whether or not the depths divide.",
    number="01.1",
    difficulty=2,
    minutes=10,
)


# -- 01.2: a monotone map from similarity -----------------------------------------------------------------------------

# By layer number: row and column 0 are the embeddings. In the first, two blocks are most like the same teacher layer;
# in the second, their nearest layers cross; in the third, the best choice for S1 leaves too little to S2.
_SIMILARITIES = tuple(
    np.array(rows)
    for rows in (
        [[0.99, 0.5, 0.4, 0.3, 0.2], [0.6, 0.5, 0.6, 0.9, 0.7], [0.3, 0.2, 0.3, 0.8, 0.7]],
        [[0.95, 0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0.4, 0.5, 0.9], [0.4, 0.3, 0.8, 0.6, 0.5]],
        [[0.95, 0.6, 0.3, 0.2, 0.2], [0.5, 0.6, 0.5, 0.8, 0.4], [0.4, 0.3, 0.9, 0.7, 0.2]],
        np.random.default_rng(3).uniform(0.1, 0.95, (4, 8)).round(2),
    )
)


def _sum(similarity: np.ndarray, pairs: Pairs) -> float:
    return float(sum(similarity[pair] for pair in pairs))


def _best(similarity: np.ndarray) -> Pairs:
    S, T = (n - 1 for n in similarity.shape)
    choices = [list(enumerate(chosen, 1)) for chosen in combinations(range(1, T + 1), S)]
    return max(choices, key=lambda pairs: _sum(similarity, pairs))


def _check_monotone(function) -> str | None:
    for similarity in _SIMILARITIES:
        S, T = (n - 1 for n in similarity.shape)
        pairs, best = _pairs(function(similarity.copy())), _best(similarity)
        if message := _wrong_layers(pairs, best, S, T):
            return f"for a student of {S} and a teacher of {T} layers it gives {_shown(pairs)}: {message}"
        students, teachers = _sides(pairs)
        case = f"for\n\n```\n{similarity}\n```\n\nit gives {_shown(pairs)}: "
        nearest = [1 + int(similarity[s, 1:].argmax()) for s in students]
        of_rows = "the best of each row by itself. " if teachers == nearest else ""
        if twice := next((t for t in teachers if teachers.count(t) > 1), None):
            several = " and ".join(f"S{s}" for s, t in pairs if t == twice)
            return f"{case}{of_rows}T{twice} teaches {several}; teacher layers have to rise strictly."
        if crossing := next(((a, b) for a, b in pairwise(pairs) if b[1] < a[1]), None):
            (above, _), (below, _) = crossing
            return f"{case}{of_rows}The links of S{above} and S{below} cross; teacher layers have to rise."
        found, possible = _sum(similarity, pairs), _sum(similarity, best)
        if possible - found > 1e-9:
            return (
                f"{case}in order, and its sum is {found:.2f}; {possible:.2f} is possible. The best choice for one row "
                "may leave too little to the next."
            )
    return None


def _wrong_layers(pairs: Pairs, best: Pairs, S: int, T: int) -> str | None:
    """Layers that are not there, or not to be mapped."""
    students, teachers = _sides(pairs)
    if students == list(range(S)):
        return "S0 takes part, the embeddings, and the last block does not: row s of the matrix is layer s."
    if students == list(range(S + 1)):
        return "S0 takes part: row and column 0 are the embeddings, which are not mapped."
    if students and max(students) > S:
        return f"S{max(students)} does not exist. Row 0 is the embeddings, not layer 1: row s is layer s."
    if students != list(range(1, S + 1)):
        return f"every student block, 1 to {S}, needs exactly one teacher layer."
    if max(teachers) > T:
        return f"T{max(teachers)} does not exist. Column 0 is the embeddings, not layer 1: column t is layer t."
    if [t + 1 for t in teachers] == _sides(best)[1]:
        return "every teacher layer is one too low: without column 0, the first column is layer 1."
    if 0 in teachers:
        return "T0 is the embeddings: column 0 is no block to learn from."
    return None


monotone = Exercise(
    "Write `my_monotone`: from a similarity matrix (S + 1, T + 1), rows and columns by layer number, a list of pairs. "
    "Every student block 1 … S gets one teacher block, deeper student blocks get strictly deeper teacher blocks, and "
    "the sum of the pairs' similarities is as large as it can be. Row and column 0 are the embeddings, which take no "
    "part.",
    _check_monotone,
    hints=[
        "How many rising choices of 2 out of 6 teacher layers are there? A computer may simply look at them all.",
        "`itertools.combinations(range(1, T + 1), S)` yields exactly the strictly rising choices; `max(…, key=…)` "
        "takes the one with the largest sum.",
        """```python
def my_monotone(similarity):
    from itertools import combinations

    S, T = similarity.shape[0] - 1, similarity.shape[1] - 1
    maps = [list(enumerate(chosen, 1)) for chosen in combinations(range(1, T + 1), S)]
    return max(maps, key=lambda pairs: sum(similarity[s, t] for s, t in pairs))
```
Of 24 layers, 12 can be chosen in 2.7 million ways; the library's dynamic program needs 12 × 24 steps.""",
    ],
    done="the largest sum that keeps the order of layers.",
    number="01.2",
    difficulty=3,
    minutes=15,
)


# -- 01.3: by hand ----------------------------------------------------------------------------------------------------


def _check_by_hand(answer) -> str | None:
    students, teachers = _sides(_pairs(answer))
    if students == [0, 1, 2, 3]:
        return (
            "your student layers are 0 to 3: 0 is the embeddings, the blocks are 1 to 4. That is the off-by-one of "
            "section 2."
        )
    if students != [1, 2, 3, 4]:
        return f"every student block, 1 to 4, needs one teacher layer; yours are {students}."
    if max(teachers) > 12:
        return f"T{max(teachers)} does not exist: the teacher's last block is T12."
    if teachers == sorted(teachers, reverse=True):
        return "that is `reverse`: deeper student layers should learn from deeper teacher layers."
    if teachers[-1] != 12:
        return f"S4 learns from T{teachers[-1]}; the last should learn from the last, T12" + (
            ": counting every third layer from the first ends two too early." if teachers == [1, 4, 7, 10] else "."
        )
    steps = [b - a for a, b in pairwise([0, *teachers])]
    return None if set(steps) == {3} else f"the steps from layer to layer are {steps}; evenly spaced means all alike."


by_hand = Exercise(
    "By hand: a student of **4** layers, a teacher of **12**. Connect them on the board below such that the last "
    "teaches the last, deeper learns from deeper, and the teacher layers are evenly spaced, the embeddings (0) being "
    "where counting starts. (No presets!) Then run the cell after it. A list of pairs will do as well.",
    _check_by_hand,
    hints=[
        "12 blocks shared out among 4 students.",
        "Student layer j learns from teacher layer 3·j.",
        "```python\nmy_pairs = [(1, 3), (2, 6), (3, 9), (4, 12)]\n```",
    ],
    done="it is `LayerMap.uniform(4, 12)`.",
    number="01.3",
    difficulty=1,
    minutes=5,
)


# -- 01.4: a bug to find ----------------------------------------------------------------------------------------------


def _check_bug(function) -> str | None:
    depths = [(S, T) for T in range(1, 13) for S in range(1, T + 1)]
    truth = {(S, T): S * (T // S) == T for S, T in depths}
    said = {pair: bool(function(*pair)) for pair in depths}
    if all(said[pair] != truth[pair] for pair in depths):
        return "exactly the wrong way round: return True where the map is right."
    if all(said[S, T] == (S % T == 0) for S, T in depths):
        return "you divide the student's depth by the teacher's; the step is the teacher's divided by the student's."
    for S, T in ((2, 6), (4, 12), (4, 6), *depths):
        if said[S, T] != truth[S, T]:
            verdict = "right" if truth[S, T] else "wrong"
            return (
                f"for {S} on {T} layers the step is {T // S}, so that S{S} learns from T{S * (T // S)}, which is "
                f"{verdict}; yours says {said[S, T]}."
            )
    return None


bug = Exercise(
    "For which depths is `uniform_by_hand` right? Write `is_right`: True where its last student layer learns from the "
    "last teacher layer. It should ask the two depths alone, not make the map.",
    _check_bug,
    hints=[
        "Which depths did the colleague try? Do 4 on 6 on paper, line by line: what is 6 // 4?",
        "The rest of the division is lost once, and then multiplied. When is there none?",
        "```python\ndef is_right(student_layers, teacher_layers):\n"
        "    return teacher_layers % student_layers == 0\n```\n"
        "`LayerMap.check` finds layers that do not exist, and none of the rest. Multiply first, divide last.",
    ],
    done="it is right where the student's depth divides the teacher's: the cases that were tried.",
    number="01.4",
    difficulty=1,
    minutes=5,
)


# -- 01.5: how alike are a map's layers? ------------------------------------------------------------------------------


def _check_mean(function) -> str | None:
    values = np.random.default_rng(0).uniform(0.1, 0.95, (3, 7))  # no two pairs alike
    for chosen in (LayerMap.reverse(2, 6), LayerMap([(1, 2), (1, 3), (2, 6)])):
        found, true = float(function(values.copy(), chosen)), _sum(values, chosen.pairs) / len(chosen)
        if abs(found - true) < 1e-6:
            continue
        others = {
            _sum(values, LayerMap.uniform(2, 6).pairs) / 2: "that is the mean of `uniform`, whatever the map.",
            _sum(values, chosen.pairs): "that is the sum over the pairs: divide by their number.",
            float(values.mean()): "that is the mean of the whole matrix: take the mapped pairs only.",
            _sum(values, [(s - 1, t - 1) for s, t in chosen]) / len(chosen): "row and column 0 are the embeddings: "
            "`values[s, t]`, not `values[s - 1, t - 1]`.",
            _sum(values, chosen.pairs) / 2: "you divide by the number of student layers; a map may give one of them "
            "several teachers. Divide by the number of pairs.",
        }
        told = (message for value, message in others.items() if abs(found - value) < 1e-6)
        return next(told, f"for {_shown(chosen.pairs)} of the check's matrix it gives {found:.3f}, not {true:.3f}.")
    return None


mean = Exercise(
    "How alike are the layers that a map puts together? Write `my_mean`: the mean of a similarity matrix over the "
    "pairs of a map. Then guess: of the maps that section 5 measured, did the least similar one teach worst?",
    _check_mean,
    hints=[
        "A map is iterable: `for s, t in layer_map`.",
        "Rows and columns are layer numbers, so `values[s, t]`. How many pairs has a map? `len(layer_map)`.",
        "```python\ndef my_mean(values, layer_map):\n"
        "    return sum(values[s, t] for s, t in layer_map) / len(layer_map)\n```\n"
        "The board says it, too.",
    ],
    done="the next cell shows it for every map of section 5, beside its score.",
    number="01.5",
    difficulty=1,
    minutes=5,
)
