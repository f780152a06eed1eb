"""Exercises of notebook 06: the stub is not done, the solution in the last hint passes,
a classic wrong answer is told what is wrong.
"""

import nbformat
import numpy as np
import pytest
from scipy import stats

from tests.notebooks.cells import NOTEBOOKS, assert_ladder, assert_told, checks, exercise, solution

SCORES = {"all": np.array([0.81, 0.84, 0.80]), "outputs": np.array([0.78, 0.83, 0.79])}
INTERVAL, CLAIM, REPORT = "interval", "claim", "honest_report"


def welch_half_width(ours, theirs):
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return (high - low) / 2


def report_of_colleague():
    """As the notebook shows it."""
    cells = nbformat.read(NOTEBOOKS / "06_results_analysis.ipynb", as_version=4).cells
    namespace: dict = {}
    exec(next(cell.source for cell in cells if cell.id == "s06-bug"), namespace)
    return namespace["report_of_colleague"]


DIFFERENCE = SCORES["all"] - SCORES["outputs"]
MEAN, DEVIATION, T = (
    DIFFERENCE.mean(),
    DIFFERENCE.std(ddof=1) / 3**0.5,
    4.302652729911275,
)  # Student's t, 2 degrees of freedom
OWN = sum((T * scores.std(ddof=1) / 3**0.5) ** 2 for scores in SCORES.values()) ** 0.5


def around(half, mean=MEAN):
    return lambda ours, theirs: (mean - half, mean + half)


def test_the_tests_know_the_scores_of_the_check():
    assert np.array_equal(checks("06").ALL, SCORES["all"]) and np.array_equal(checks("06").OUTPUTS, SCORES["outputs"])


@pytest.mark.parametrize("name", [INTERVAL, CLAIM, REPORT])
def test_the_solution_in_the_hints_passes_and_the_stub_is_not_done(name):
    assert_ladder("06", name, {})


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (INTERVAL, around(1.96 * DEVIATION), "with 3 seeds Student's t is 4.30"),
        (INTERVAL, around(OWN), "adds up the two arms' own intervals"),
        (INTERVAL, around(welch_half_width(SCORES["all"], SCORES["outputs"])), "the unpaired interval"),
        (INTERVAL, around(T * DEVIATION * (2 / 3) ** 0.5), "n − 1"),
        (INTERVAL, around(DEVIATION), "the width is not"),
        (INTERVAL, around(T * DEVIATION, -MEAN), "its middle is"),
        (INTERVAL, around(-T * DEVIATION), "low comes first"),
        (CLAIM, "a", "does not say that there is no difference"),
        (CLAIM, "c", "were paired"),
        (CLAIM, "d", "equal-compute row"),
        (CLAIM, "e", "one letter"),
        (REPORT, report_of_colleague(), "the function as it was"),
        (REPORT, lambda validation, test: validation.max(), "as lucky as the other"),
        (REPORT, lambda validation, test: test[-1], "the last checkpoint needs no choice"),
        (REPORT, lambda validation, test: test.mean(), "the accuracy of no model"),
        (REPORT, lambda validation, test: test[(validation + test).argmax()], "by both sets together"),
        (REPORT, lambda validation, test: 0.5, "it gives 0.500"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, message):
    assert_told(exercise("06", name), answer, message)


def test_the_bug_lies_and_its_repair_does_not():
    truth, validation, test = checks("06").made_up_runs(runs=2000)
    repaired = solution(exercise("06", REPORT), {})
    for report, chooser, luck in ((report_of_colleague(), test, 0.03), (repaired, validation, 0.0)):
        reported = np.mean([report(v, t) for v, t in zip(validation, test, strict=True)])
        assert reported - truth[chooser.argmax(1)].mean() == pytest.approx(luck, abs=0.01)
