"""Checks of the exercises of notebook 06."""

from __future__ import annotations

import numpy as np
from scipy import stats

from fakit.experiments import paired_difference
from fakit.experiments.statistics import mean_interval
from fakit.teaching import Exercise

# -- 06.1 -------------------------------------------------------------------------------------------------------------

ALL, OUTPUTS = np.array([0.81, 0.84, 0.80]), np.array([0.78, 0.83, 0.79])  # made up: three paired seeds

INTERVAL_HINT = """```python
from scipy import stats

def my_interval(ours, theirs):
    d = ours - theirs
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5
    return d.mean() - half, d.mean() + half
```"""


def check_interval(answer) -> str | None:
    """The 95 % interval of a paired difference over three seeds."""
    low, high = (float(end) for end in answer(ALL.copy(), OUTPUTS.copy()))
    if low > high:
        return "low comes first."
    target = paired_difference(ALL, OUTPUTS)
    if abs(low - target.low) < 1e-4 and abs(high - target.high) < 1e-4:
        return None
    for why, wrong in _wrong_half_widths().items():
        if abs((high - low) / 2 - wrong) < 1e-4:
            return why
    middle = (low + high) / 2
    if abs(middle - target.mean) > 1e-4:
        return f"its middle is {middle:.4f}, and the mean difference *ours − theirs* is {target.mean:.4f}."
    return "the middle is right, the width is not: t · sd(d) / √n on either side."


def _wrong_half_widths() -> dict[str, float]:
    """What is wrong → the half width that it makes."""
    d = ALL - OUTPUTS
    target, normal = paired_difference(ALL, OUTPUTS), 1.96 * d.std(ddof=1) / len(d) ** 0.5
    welch = stats.ttest_ind(ALL, OUTPUTS, equal_var=False).confidence_interval(0.95)
    own = [(interval.high - interval.low) / 2 for interval in map(mean_interval, (ALL, OUTPUTS))]
    t = (target.high - target.mean) / normal * 1.96
    return {
        f"1.96 is the normal distribution's; with {len(d)} seeds Student's t is {t:.2f}.": normal,
        "that is Welch's, the unpaired interval: take the differences first, seed by seed.": (welch.high - welch.low)
        / 2,
        "that adds up the two arms' own intervals: take the differences first, seed by seed.": (
            own[0] ** 2 + own[1] ** 2
        )
        ** 0.5,
        "divide the squared deviations by n − 1: `std(ddof=1)`.": (target.high - target.mean) * (1 - 1 / len(d)) ** 0.5,
    }


interval = Exercise(
    "Write the 95 % interval (low, high) of the paired difference *ours − theirs*, two arrays with one score a seed.",
    check_interval,
    hints=[
        "Differences first.",
        "`scipy.stats.t.ppf(0.975, n - 1)` times the standard error of the mean.",
        INTERVAL_HINT,
    ],
    done='try it on the study: `my_interval(scores_of(tasks[0], "all"), scores_of(tasks[0], "outputs"))`.',
    number="06.1",
    difficulty=2,
    minutes=8,
)


# -- 06.2 -------------------------------------------------------------------------------------------------------------


def check_claim(answer) -> str | None:
    """The letter of the only sentence that the interval supports."""
    return {
        "a": "an interval that includes 0 does not say that there is no difference: with more seeds one may show.",
        "b": None,
        "c": "the seeds were paired; adding the two arms' own intervals throws that away.",
        "d": "the equal-steps comparison gives the teacher's forward passes away for free; that claim needs the "
        "equal-compute row.",
    }.get(str(answer).strip().lower(), "answer with one letter: a, b, c or d.")


claim = Exercise(
    "An arm gains +0.4 points over soft labels, 95 % interval −0.3 to +1.1, three paired seeds. Which sentence may "
    "stand in the paper?\n\n"
    "- a) Features and attention bring nothing beyond soft labels.\n"
    "- b) With three seeds, the gain over soft labels was not significant.\n"
    "- c) The arms' own intervals overlap, so the arms are equal.\n"
    "- d) For the same training cost, all three terms are at least as good.",
    check_claim,
    hints=[
        "What does an interval around 0 exclude, and what not?",
        "Two of them claim that nothing is there; one changes the subject.",
        '```python\nmy_claim = "b"\n```',
    ],
    done="say what was seen, with its n.",
    number="06.2",
    difficulty=1,
    minutes=4,
)


# -- 06.3 -------------------------------------------------------------------------------------------------------------


def made_up_runs(
    runs: int = 2000, checkpoints: int = 20, texts: int = 300, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs whose truth is known.

    Returns:
        The true accuracy at each checkpoint (checkpoints,), and what a validation and a test set of so many texts show
        of it, (runs, checkpoints) each.
    """
    draw = np.random.default_rng(seed)
    truth = 0.80 - 0.10 * np.exp(-np.arange(checkpoints) / 3)
    validation, test = (draw.binomial(texts, truth, (runs, checkpoints)) / texts for _ in range(2))
    return truth, validation, test


def check_report(answer) -> str | None:
    """A report of 300 made-up runs: the test accuracy of the checkpoint that validation chose."""
    truth, validation, test = made_up_runs(runs=300, seed=1)
    mine = np.array([float(answer(v, t)) for v, t in zip(validation, test, strict=True)])
    rows = np.arange(len(mine))
    if np.allclose(mine, test[rows, validation.argmax(axis=1)]):
        return None
    luck = f"on average it reports {mine.mean():.3f}, and no checkpoint is truly better than {truth.max():.3f}."
    known = [
        (test.max(axis=1), "that is the function as it was: which set chooses? " + luck),
        (
            validation.max(axis=1),
            "that is the validation accuracy of the chosen checkpoint, as lucky as the other: report what the other "
            "set says. " + luck,
        ),
        (
            test[:, -1],
            "the last checkpoint needs no choice, and is honest; but the question was for the best one, chosen without "
            "the test set.",
        ),
        (test.mean(axis=1), "a mean over checkpoints is the accuracy of no model: choose one, then report it."),
        (
            test[rows, (validation + test).argmax(axis=1)],
            "that chooses by both sets together; test data that choose cannot judge. " + luck,
        ),
    ]
    otherwise = f"for the first run it gives {mine[0]:.3f}; choose a checkpoint, then report it."
    return next((why for values, why in known if np.allclose(mine, values)), otherwise)


honest_report = Exercise(
    "Repair `report_of_colleague`: write `my_report(validation, test)`, which still reports the best checkpoint's test "
    "accuracy, and is right on average.",
    check_report,
    hints=[
        "Data that choose cannot judge: a maximum of noisy numbers is too high.",
        "There are two sets. One chooses the checkpoint, the other is looked at once, there.",
        "```python\ndef my_report(validation, test):\n    return test[validation.argmax()]\n```",
    ],
    done="the validation set pays for the choice, the test set stays honest. `fakit distill` chooses nothing: it "
    "reports the last step.",
    number="06.3",
    difficulty=2,
    minutes=6,
)
