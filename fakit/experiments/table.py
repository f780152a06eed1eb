"""The table of a study: task × arm, with means, paired differences and what they cost. README's table is this one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fakit.experiments.schema import did_you_mean
from fakit.experiments.statistics import Interval, differing_settings, gap_closed, paired_table
from fakit.experiments.store import RunStore

BASELINES = ("none", "outputs")  # labels alone, and plain soft-label distillation
UNSCALED = frozenset({"perplexity", "bits_per_byte", "nll", "loss", "mse"})  # not shown in percent
_COMPARISON = {  # columns of paired_table → of study_table, {} the baseline arm
    "gain": "gain_over_{}",
    "gain_low": "gain_over_{}_low",
    "gain_high": "gain_over_{}_high",
    "gains": "gains_over_{}",
    "p_holm": "p_holm_over_{}",
    "pairs": "pairs_with_{}",
}


def study_table(store: RunStore, baselines: Sequence[str] | None = None, level: float = 0.95) -> pd.DataFrame:
    """One row a task and arm, then the untrained baselines of each task.

    Args:
        baselines: the arms that gains are paired against, and from the first of which the gap to the teacher is closed.
            By default "none" and "outputs", as far as they were run.
        level: of the intervals.

    Returns:
        columns task, arm, kind ("run", of compressions too, or "baseline"), metric, higher_is_better, n, seeds, scores,
        mean, low, high; for each X of `baselines` gain_over_X, …_low, …_high, gains_over_X (one a pair),
        p_holm_over_X, pairs_with_X; gap_closed, …_low, …_high (nan where not available); steps, flops (training,
        mean), agreement (with the teacher, mean); no_score: seeds whose student gave NaN, which no mean counts.

    Raises:
        ValueError: the store holds no finished run, or none of an arm of `baselines`.
    """
    _check_records(store)
    runs = store.runs()
    if runs.empty:
        raise ValueError(
            f"{store.path} holds no finished run yet; `fakit distill CONFIG.yaml` or `fakit study` adds some."
        )
    runs = runs.assign(task=distinct_tasks(runs), score=runs["score"].astype(float))
    runs["kind"] = runs["kind"].replace("compression", "run")  # compressions are compared as runs are
    for column in {"steps", "flops"} - set(runs):  # which low rank has no word for
        runs[column] = math.nan
    runs = runs.assign(arm=distinct_arms(runs))
    arms = runs.loc[runs["kind"] == "run", "arm"].unique()
    for arm in baselines or ():
        if arm not in arms:
            raise ValueError(
                f"baselines: {arm!r} is not among the arms of {store.path}, which are {', '.join(arms)}."
                + did_you_mean(arm, arms)
            )
    compared = BASELINES if baselines is None else tuple(baselines)
    untrained = runs[runs["kind"] == "baseline"]
    parts = []
    for task in runs["task"].unique():
        trained = runs[(runs["task"] == task) & (runs["kind"] == "run")]
        beside = untrained[untrained["task"] == task]
        if len(trained):
            teacher = beside.loc[beside["arm"] == "teacher", "score"]
            known = len(teacher) and not math.isnan(teacher.iloc[0])
            parts.append(_task_table(trained, teacher.iloc[0] if known else None, compared, level))
        parts.append(_baseline_rows(beside))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _check_records(store: RunStore) -> None:
    """Raise ValueError where a record lacks what a comparison needs, as of another program or a hand."""
    kinds = {
        "task": str,
        "arm": str,
        "kind": str,
        "metric": str,
        "seed": int,
        "score": int | float | None,
        "higher_is_better": bool,
    }
    for record in store.records():
        for name, kind in kinds.items():
            if not isinstance(record.get(name), kind):
                found = repr(record[name])[:60] if name in record else "nothing"
                raise ValueError(
                    f"{store.path / 'runs.jsonl'}: the run {record['run_id']} has {found} as its {name}, so it cannot "
                    "be compared with others; take its line out (keep a copy), or record the run again."
                )


def distinct_arms(runs: pd.DataFrame) -> pd.Series:
    """Arm names that tell configurations and versions apart: "all",
    or "all · layer_map=reverse" where one arm was run in several ways.

    Runs that differ in more than the seed are never seeds of one arm.
    """
    names = runs["arm"].copy()
    for _, group in runs.groupby(["task", "arm", "kind"], sort=False):
        _tell_apart(names, group, differing_settings(group))
    return names


def distinct_tasks(runs: pd.DataFrame) -> pd.Series:
    """Task names that tell tasks apart: the name, with what differs where two files of one name,
    options or texts stand behind it.
    """
    names = runs["task"].copy()
    asked = [column for column in runs if column == "config.task.name" or column.startswith("config.task.options")]
    for _, group in runs.groupby("task", sort=False):
        varying = [key for key in asked if group[key].map(repr).nunique() > 1]
        if not varying and "data" in group and group["data"].dropna().nunique() > 1:
            varying = ["data"]
        _tell_apart(names, group, varying)
    return names


def _tell_apart(names: pd.Series, group: pd.DataFrame, varying: list[str]) -> None:
    """Put behind the names of a group what differs in it."""
    for index, row in group.iterrows():
        changes = [f"{key.removeprefix('config.')}={row[key]}" for key in varying]
        names[index] = " · ".join([names[index], *changes])


def scale(metric: str) -> tuple[float, str]:
    """How a metric is shown: (100, "%") for shares, (1, "") for perplexity and its kind."""
    return (1.0, "") if metric in UNSCALED else (100.0, " %")


def compared_with(table: pd.DataFrame) -> list[str]:
    """The baselines of a `study_table`."""
    return [column.removeprefix("pairs_with_") for column in table if column.startswith("pairs_with_")]


def to_markdown(table: pd.DataFrame, baselines: Sequence[str] | None = None) -> str:
    """The table for people: one block a task, means ± intervals, differences with a sign, what they cost.

    Args:
        baselines: of those of the table the ones to show; all by default.
    """
    blocks = []
    for task, rows in table.groupby("task", sort=False):
        first = rows.iloc[0]
        _, unit = scale(first["metric"])
        better = "higher" if first["higher_is_better"] else "lower"
        over = [
            arm
            for arm in (compared_with(table) if baselines is None else baselines)
            if f"gain_over_{arm}" in rows and rows[f"gain_over_{arm}"].notna().any()
        ]
        heads = [f"{task}", f"test {first['metric']}{unit} ({better} is better)"]
        heads += [f"gain over {arm}" for arm in over] + ["gap closed", "agreement", "seeds", "steps", "TFLOPs"]
        blocks.append("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        blocks += ["| " + " | ".join(_cells(row, over)) + " |" for _, row in rows.iterrows()]
        blocks.append("")
    return "\n".join(blocks)


def _task_table(trained: pd.DataFrame, teacher: float | None, baselines: tuple[str, ...], level: float) -> pd.DataFrame:
    everything, trained = trained, trained.dropna(subset=["score"])
    lost = everything[everything["score"].isna()].groupby("arm", sort=False).size()
    if trained.empty:
        return _without_score(everything, lost)
    arms = trained["arm"].unique()
    own = paired_table(trained, "score", arms[0], level)
    table = own[["task", "arm", "n", "seeds", "scores", "mean", "low", "high"]].copy()
    table.insert(2, "kind", "run")
    table.insert(3, "metric", trained["metric"].iloc[0])
    table.insert(4, "higher_is_better", bool(trained["higher_is_better"].iloc[0]))
    for baseline in (arm for arm in baselines if arm in arms):
        gains = paired_table(trained, "score", baseline, level)
        for column, name in _COMPARISON.items():
            table[name.format(baseline)] = gains[column]
    by_arm = trained.groupby("arm", sort=False)
    means = by_arm[["steps", "flops"]].mean(numeric_only=False)
    if "test.agreement" in trained:
        means["agreement"] = by_arm["test.agreement"].mean()
    table = table.join(means, on="arm")
    if teacher is not None and baselines and baselines[0] in arms:
        closed = [_gap_closed(trained, arm, baselines[0], teacher, level) for arm in table["arm"]]
        for column, values in zip(
            ("gap_closed", "gap_closed_low", "gap_closed_high"), zip(*closed, strict=True), strict=True
        ):
            table[column] = values
    table["no_score"] = table["arm"].map(lost).fillna(0).astype(int)
    rest = [arm for arm in lost.index if arm not in set(arms)]
    return pd.concat([table, _without_score(everything, lost[rest])]) if rest else table


def _without_score(trained: pd.DataFrame, lost: pd.Series) -> pd.DataFrame:
    """A row for each arm of which no run has a score: its students diverged."""
    first = trained.iloc[0]
    same = {
        "task": first["task"],
        "kind": "run",
        "metric": first["metric"],
        "higher_is_better": bool(first["higher_is_better"]),
    }
    rows = []
    for arm, count in lost.items():
        of_arm = trained[trained["arm"] == arm]
        costs = {name: of_arm[name].astype(float).mean() for name in ("steps", "flops") if name in of_arm}
        rows.append(
            {**same, "arm": arm, "n": 0, "seeds": [], "scores": [], "no_score": count, "mean": math.nan, **costs}
        )
    return pd.DataFrame(rows)


def _gap_closed(
    trained: pd.DataFrame, arm: str, start: str, teacher: float, level: float
) -> tuple[float, float, float]:
    scores = {name: trained[trained["arm"] == name].set_index("seed")["score"].sort_index() for name in (arm, start)}
    common = scores[arm].index.intersection(scores[start].index)
    if arm == start or common.empty:
        return (math.nan,) * 3
    closed = gap_closed(scores[arm][common], scores[start][common], float(teacher), level)
    return (closed.value.mean, closed.value.low, closed.value.high) if closed.value else (math.nan,) * 3


def _baseline_rows(beside: pd.DataFrame) -> pd.DataFrame:
    columns = ["task", "arm", "kind", "metric", "higher_is_better"]
    table = beside[columns].assign(n=1, mean=beside["score"])
    return table.assign(agreement=beside["test.agreement"]) if "test.agreement" in beside else table


def _cells(row: pd.Series, over: list[str]) -> list[str]:
    factor, _ = scale(row["metric"])
    digits = 1 if factor == 100 else 2
    cells = [f"*{row['arm']}*" if row["kind"] == "baseline" else row["arm"]]
    cells.append(_interval(row, "mean", "low", "high").format(factor, digits))
    for arm in over:
        name = f"gain_over_{arm}"
        cells.append(_interval(row, name, f"{name}_low", f"{name}_high").format(factor, digits, sign=True))
    cells.append(_interval(row, "gap_closed", "gap_closed_low", "gap_closed_high").format(100, 0) + " %")
    cells.append(f"{100 * row.get('agreement', math.nan):.1f} %")
    is_run = row["kind"] == "run"
    lost = row.get("no_score", 0)
    seeds = f"{row['n']} (and {lost:.0f} without a score)" if is_run and lost > 0 else str(row["n"])
    cells += [seeds if is_run else "–", f"{row['steps']:.0f}" if is_run else "–"]
    cells.append(f"{row.get('flops', math.nan) / 1e12:.1f}")
    return ["–" if "nan" in cell else cell for cell in cells]


def _interval(row: pd.Series, mean: str, low: str, high: str) -> Interval:
    values: list[Any] = [row.get(name, math.nan) for name in (mean, low, high)]
    return Interval(*map(float, values), n=row["n"])
