"""Rules on what came out: scores beside baselines and the teacher, and what may be claimed of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import pandas as pd
from scipy import stats

from fakit.experiments.doctor.recorded import Arm, Recorded, seeds_of
from fakit.experiments.doctor.rule import Lacking, Rule, Seen
from fakit.experiments.statistics import Interval, mean_interval
from fakit.experiments.table import UNSCALED, compared_with, scale

APART, RATIO, ERRORS = 0.1, 1.5, 3.0
CHANCE = 2.0  # standard errors
ALPHA = 0.05  # of p after Holm
SHOWN = 4  # arms that are named one by one

UNTRAINED = {"untrained": "the student without training", "copy": "the input left as it is"}


# -- beside baselines and the teacher ---------------------------------------------------------------------------------


def _teacher_of(recorded: Recorded, arms: list[Arm]) -> float | None:
    """The teacher's test score on a task: the baseline, else what the runs say."""
    metric = arms[0].metric
    if (score := recorded.baselines.get(arms[0].task, {}).get("teacher")) is not None:
        return score
    found = [(record.get("teacher") or {}).get(metric) for arm in arms for record in arm.records]
    known = [score for score in found if score is not None]
    return mean(known) if known else None


def _majority(arm: Arm) -> tuple[float, float] | None:
    """Of an accuracy: the share of the largest class among the test texts, and its standard error."""
    texts = arm.records[0].get("texts") or {}
    share = texts.get("majority")
    if arm.metric != "accuracy" or share is None:
        return None
    return share, math.sqrt(share * (1 - share) / texts["test"])


def _weak_teacher(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arms in recorded.by_task().values():
        teacher = _teacher_of(recorded, arms)
        if teacher is None:
            yield Lacking("the teacher's score", sum(len(arm.records) for arm in arms))
            continue
        for arm in arms:
            if not (scores := arm.finite_scores):
                continue
            own = mean_interval(scores)
            # where one seed gives no interval, its score
            worst = own.mean if math.isnan(own.low) else (own.low if arm.records[0]["higher_is_better"] else own.high)
            if arm.better(worst, than=teacher):
                numbers = f"{arm.metric} {_interval(own, arm)} in {seeds_of(arm)}, the teacher's {arm.shown(teacher)}"
                yield Seen(arm.task, (arm.name,), numbers)


def _teacher_of_chance(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for task, arms in recorded.by_task().items():
        arm, teacher = arms[0], _teacher_of(recorded, arms)
        if teacher is None:
            continue  # said by the rule before
        untrained, majority = recorded.baselines.get(task, {}).get("untrained"), _majority(arm)
        names = tuple(a.name for a in arms if a.transfers)
        if not names:
            continue
        if untrained is not None and not arm.better(teacher, than=untrained):
            numbers = f"the teacher has {arm.metric} {arm.shown(teacher)}, the student without training "
            yield Seen(task, names, numbers + arm.shown(untrained))
        if majority is not None and teacher <= majority[0] + CHANCE * majority[1]:
            share, error = (arm.shown(x) for x in majority)
            numbers = f"the teacher has accuracy {arm.shown(teacher)}, the largest class alone {share} ± {error}"
            yield Seen(task, names, numbers)


def _no_better_than_nothing(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        beside = {UNTRAINED[n]: s for n, s in recorded.baselines.get(arm.task, {}).items() if n in UNTRAINED}
        if (majority := _majority(arm)) is not None:
            beside["the largest class alone"] = majority[0]
        if not beside:
            yield Lacking("a baseline without training (untrained, copy)", len(arm.records))
        if not (scores := arm.finite_scores):
            continue
        own = mean_interval(scores)
        for name, score in beside.items():
            if not arm.better(own.mean, than=score):
                numbers = f"{arm.metric} {_interval(own, arm)} in {seeds_of(arm)}, {name} {arm.shown(score)}"
                yield Seen(arm.task, (arm.name,), numbers)


def _worse_than_labels(recorded: Recorded) -> Iterator[Seen | Lacking]:
    transfers = {(arm.task, arm.name) for arm in recorded.arms if arm.transfers}
    table = recorded.table
    if "gain_over_none_high" not in table:
        if (runs := sum(len(arm.records) for arm in recorded.arms if arm.transfers)) > 0:
            yield Lacking("an arm on labels alone (none)", runs)
        return
    worse = (table["gain_over_none_high"] < 0) & (table["p_holm_over_none"] < ALPHA)
    for _, row in table[worse].iterrows():
        if (row["task"], row["arm"]) in transfers:
            gain = _gain(row, "none")
            yield Seen(row["task"], (row["arm"],), f"gain over none {gain} with {int(row['pairs_with_none'])} pairs")


# -- what may be claimed ----------------------------------------------------------------------------------------------


def _not_significant(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for task, over, rows in _comparisons(recorded):
        low, high = (rows[f"gain_over_{over}_{end}"] for end in ("low", "high"))
        open_ = rows[~((low > 0) | (high < 0))]  # no interval at all, too
        if open_.empty:
            continue
        pairs = int(open_[f"pairs_with_{over}"].min())
        numbers = f"{len(open_)} of {len(rows)} gains over {over} include 0 or have no interval: {_named(open_, over)}"
        widths = (high - low).dropna() / 2
        if len(widths) and pairs > 1:
            factor, _ = scale(rows["metric"].iloc[0])
            half = factor * median(widths)
            more = 2 * pairs
            numbers += f". The median interval is ± {half:.2g} with {pairs} pairs, and would be about "
            numbers += f"± {half * _width(more) / _width(pairs):.2g} with {more}"
        yield Seen(task, tuple(open_["arm"]), numbers)
    if not compared_with(recorded.table) and len(recorded.arms) > 1:
        yield Lacking("an arm to compare with (none, outputs, or one of `baselines`)", _runs(recorded))


def _unpaired(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for task, over, rows in _comparisons(recorded):
        of_task = recorded.table[recorded.table["task"] == task]
        theirs = set(of_task.loc[of_task["arm"] == over, "seeds"].iloc[0])
        lone = {row["arm"]: sorted(theirs ^ set(row["seeds"])) for _, row in rows.iterrows()}
        lone = {arm: seeds for arm, seeds in lone.items() if seeds}
        if lone:
            shown = "; ".join(f"{arm}: {', '.join(map(str, seeds))}" for arm, seeds in list(lone.items())[:SHOWN])
            more = f" and {len(lone) - SHOWN} more arms" if len(lone) > SHOWN else ""
            yield Seen(task, tuple(lone), f"seeds that one of the arm and {over} lacks: {shown}{more}")


def _comparisons(recorded: Recorded) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Task, baseline arm, and the rows of the table that are compared with it."""
    table = recorded.table
    for number, over in enumerate(compared := compared_with(table)):
        before = compared[:number]
        runs = table[(table["kind"] == "run") & (table["n"] > 0)]
        for task, rows in runs.groupby("task", sort=False):
            others = rows[~rows["arm"].isin([over, *before])]  # a pair of baselines is compared once
            if over in set(rows["arm"]) and len(others):
                yield str(task), over, others


def _width(pairs: int) -> float:
    """Of an interval, over the standard deviation of a pair: t / √n."""
    return float(stats.t.ppf(0.975, pairs - 1)) / math.sqrt(pairs)


def _gain(row: pd.Series, over: str) -> str:
    factor, unit = scale(row["metric"])
    values = [float(row[f"gain_over_{over}{end}"]) for end in ("", "_low", "_high")]
    if math.isnan(values[0]):
        return "without a pair"
    shown = Interval(*values, n=int(row[f"pairs_with_{over}"])).format(factor, 1 if unit else 2, sign=True)
    return shown + (" points" if unit else "")


def _named(rows: pd.DataFrame, over: str) -> str:
    shown = [f"{row['arm']} {_gain(row, over)}" for _, row in rows.head(SHOWN).iterrows()]
    return "; ".join(shown) + (f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def _interval(own: Interval, arm: Arm) -> str:
    factor, unit = scale(arm.metric)
    return own.format(factor, 1 if unit else 2) + unit


def _apart(recorded: Recorded) -> Iterator[Seen | Lacking]:
    for arm in recorded.arms:
        both = [
            ((r.get("validation") or {}).get(arm.metric), (r.get("test") or {}).get(arm.metric)) for r in arm.records
        ]
        pairs = [(v, t) for v, t in both if v is not None and t is not None and math.isfinite(v) and math.isfinite(t)]
        if not pairs:
            yield Lacking("validation scores", len(arm.records))
            continue
        validation, test = (mean(side) for side in zip(*pairs, strict=True))
        if arm.metric in UNSCALED:
            far = min(validation, test) > 0 and max(validation, test) / min(validation, test) >= RATIO
        else:
            far = abs(validation - test) >= max(APART, ERRORS * _error_of_difference(arm, test))
        if far:
            numbers = f"{arm.metric} {arm.shown(validation)} on validation, {arm.shown(test)} on test"
            yield Seen(arm.task, (arm.name,), f"{numbers}, mean of {seeds_of(arm)}{_sizes(arm)}")


def _error_of_difference(arm: Arm, share: float) -> float:
    """Of two accuracies on so many texts; 0 where the number of texts is not recorded."""
    texts = arm.records[0].get("texts") or {}
    if not {"validation", "test"} <= texts.keys() or not 0 <= share <= 1:
        return 0.0
    return math.sqrt(share * (1 - share) * (1 / texts["validation"] + 1 / texts["test"]))


def _sizes(arm: Arm) -> str:
    texts = arm.records[0].get("texts") or {}
    if not {"validation", "test"} <= texts.keys():
        return "; how many texts these are is not recorded"
    return f", {texts['validation']:,} and {texts['test']:,} texts"


def _mixed(recorded: Recorded) -> Iterator[Seen | Lacking]:
    lacking = sum(not record.get("made_on") for arm in recorded.arms for record in arm.records)
    if lacking:
        yield Lacking("processor and commit", lacking)
    for task, arms in recorded.by_task().items():
        found: dict[str, set[str]] = {}
        names: dict[str, None] = {}
        for seed in {record["seed"] for arm in arms for record in arm.records}:
            own = [(arm.name, _made(r)) for arm in arms for r in arm.records if r["seed"] == seed]
            for key in dict.fromkeys(key for _, made in own for key in made):
                values = {made[key] for _, made in own if key in made}
                if len(values) > 1:
                    found.setdefault(key, set()).update(values)
                    names |= dict.fromkeys(name for name, made in own if key in made)
        if found:
            shown = "; ".join(f"{key}: {', '.join(sorted(values))}" for key, values in found.items())
            yield Seen(task, tuple(names), f"runs of one seed were made with {shown}")


def _made(record: dict[str, Any]) -> dict[str, str]:
    """What a run was made with, as far as it is recorded."""
    made = {**(record.get("versions") or {}), **(record.get("made_on") or {}), "precision": record.get("precision")}
    made["commit"] = made["commit"][:8] if made.get("commit") else None
    return {key: str(value) for key, value in made.items() if value is not None}


def _runs(recorded: Recorded) -> int:
    return sum(len(arm.records) for arm in recorded.arms)


RULES = (
    Rule(
        "no better than no training",
        "warning",
        "the mean score is no better than that of the untrained student, of the input left as it is, or of the largest "
        "class",
        "what is free of charge is the least that training has to beat",
        "Training has taken away what was there, or has not got as far as doing nothing.",
        "Longer training or another learning rate; a term that reads the head (outputs, task); for a copied student "
        "`init: copy` and layers spread over the teacher.",
        _no_better_than_nothing,
    ),
    Rule(
        "worse than labels alone",
        "warning",
        f"the whole 95 % interval of the paired gain over `none` lies below 0, and p after Holm is below {ALPHA}",
        "Student t over paired seeds, as in the table; of many arms one lies below 0 by chance (Holm 1979)",
        "What the terms ask for takes away from the task, at this length and with these weights.",
        "Lower the weights of the transfer terms, take one term at a time, or train longer.",
        _worse_than_labels,
    ),
    Rule(
        "teacher weaker than the student",
        "warning",
        "the student's 95 % interval (of one seed its score) lies above the teacher's score",
        "a teacher is there to show what the student cannot do yet",
        "The targets hold the student back.",
        "Fine-tune the teacher on this task first, or take a larger one.",
        _weak_teacher,
    ),
    Rule(
        "teacher no better than chance",
        "warning",
        f"the teacher's score is not above the untrained student's, or within {CHANCE:g} standard errors (of an "
        "accuracy on so many test texts) of the largest class",
        "nothing can be learned from a teacher that knows nothing of the task",
        "A teacher that was not trained for this task, or whose classes stand in another order.",
        "Fine-tune the teacher (scripts/train_teacher.py shows how), and look at its labels: `preflight(teacher, "
        "student)`.",
        _teacher_of_chance,
    ),
    Rule(
        "validation and test apart",
        "warning",
        f"the means differ by {100 * APART:.0f} points or more, and where the number of texts is recorded by "
        f"{ERRORS:g} standard errors of two accuracies; of perplexities and losses by a factor of {RATIO:g}",
        "two random halves of one set of texts do not differ like that",
        "The two splits are not of one kind, or one of them was trained or chosen on.",
        "Split again at random, and look at both: length, source, share of classes.",
        _apart,
    ),
    Rule(
        "gain not significant",
        "note",
        "the 95 % interval of a paired gain includes 0, or there is one pair and no interval",
        "with 2, 3 and 5 pairs Student's t is 12.7, 4.3 and 2.8, so that fewer than five seeds see large gains alone",
        "Of these arms no gain or loss may be claimed, and no equality either.",
        "More seeds (the same `fakit study` runs what is missing), or say that it is not known.",
        _not_significant,
    ),
    Rule(
        "seeds not paired",
        "note",
        "an arm and the arm that it is compared with were run with other seeds",
        "differences are taken within a seed, so the other runs count for nothing",
        "Part of the runs is in no comparison, and means over seeds are of other labels and starts.",
        "Run the missing seeds: the same `fakit study` goes on.",
        _unpaired,
    ),
    Rule(
        "mixed versions or machines",
        "note",
        "runs of one task and seed differ in version, commit, processor, GPU or precision",
        "bf16 or float32 and the order of sums differ between processors, and code between commits; within a seed the "
        "difference would be taken for the arm's",
        "A difference between arms may be one of code or machine.",
        "Run a whole seed with one version on one machine; `bf16: false` where processors differ.",
        _mixed,
    ),
)
