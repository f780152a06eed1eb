"""The table of a study: task × arm, with means, paired differences and what they cost. README's table is this one."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fakit.experiments.statistics import Interval, differing_settings, gap_closed, paired_table
from fakit.experiments.store import RunStore

SOFT_LABELS = "outputs"  # the arm that is plain soft-label distillation
UNSCALED = frozenset({"perplexity", "bits_per_byte", "nll", "loss", "mse"})  # not shown in percent
_COMPARISON = {  # columns of paired_table → of study_table, {} the baseline arm
    "gain": "gain_over_{}",
    "gain_low": "gain_over_{}_low",
    "gain_high": "gain_over_{}_high",
    "gains": "gains_over_{}",
    "p_holm": "p_holm_over_{}",
    "pairs": "pairs_with_{}",
}


def study_table(store: RunStore, level: float = 0.95) -> pd.DataFrame:
    """One row a task and arm, then the baselines of each task.

    Columns: task, arm, kind ("run" or "baseline"), metric, higher_is_better, n, seeds, scores, mean, low, high; for
    each X of none and outputs that the task was run with: gain_over_X, …_low, …_high, gains_over_X (one a pair),
    p_holm_over_X, pairs_with_X; gap_closed, …_low, …_high from none to the teacher (nan where not available); steps,
    flops (training, mean), agreement (with the teacher, mean); no_score: seeds whose student gave NaN,
    which no mean counts.

    Raises:
        ValueError: the store holds no finished run.
    """
    _check_records(store)
    runs = store.runs()
    if runs.empty:
        raise ValueError(f"{store.path} holds no finished run yet; `fakit distill CONFIG.yaml` or run_study adds some.")
    runs = runs.assign(task=distinct_tasks(runs), score=runs["score"].astype(float))
    runs = runs.assign(arm=distinct_arms(runs))
    baselines = runs[runs["kind"] == "baseline"]
    parts = []
    for task in runs["task"].unique():
        trained = runs[(runs["task"] == task) & (runs["kind"] == "run")]
        beside = baselines[baselines["task"] == task]
        if len(trained):
            teacher = beside.loc[beside["arm"] == "teacher", "score"]
            known = len(teacher) and not math.isnan(teacher.iloc[0])
            parts.append(_task_table(trained, teacher.iloc[0] if known else None, level))
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


def to_markdown(table: pd.DataFrame) -> str:
    """The table for people: one block a task, means ± intervals, differences with a sign, what they cost."""
    blocks = []
    for task, rows in table.groupby("task", sort=False):
        first = rows.iloc[0]
        _, unit = scale(first["metric"])
        better = "higher" if first["higher_is_better"] else "lower"
        over = [
            arm
            for arm in ("none", SOFT_LABELS)
            if f"gain_over_{arm}" in rows and rows[f"gain_over_{arm}"].notna().any()
        ]
        heads = [f"{task}", f"test {first['metric']}{unit} ({better} is better)"]
        heads += [f"gain over {arm}" for arm in over] + ["gap closed", "agreement", "seeds", "steps", "TFLOPs"]
        blocks.append("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        blocks += ["| " + " | ".join(_cells(row, over)) + " |" for _, row in rows.iterrows()]
        blocks.append("")
    return "\n".join(blocks)


def _task_table(trained: pd.DataFrame, teacher: float | None, level: float) -> pd.DataFrame:
    everything, trained = trained, trained.dropna(subset=["score"])
    lost = everything[everything["score"].isna()].groupby("arm", sort=False).size()
    if trained.empty:
        return _without_score(everything, lost)
    arms = trained["arm"].unique()
    own = paired_table(trained, "score", "none" if "none" in arms else arms[0], level)
    table = own[["task", "arm", "n", "seeds", "scores", "mean", "low", "high"]].copy()
    table.insert(2, "kind", "run")
    table.insert(3, "metric", trained["metric"].iloc[0])
    table.insert(4, "higher_is_better", bool(trained["higher_is_better"].iloc[0]))
    for baseline in (arm for arm in ("none", SOFT_LABELS) if arm in arms):
        gains = paired_table(trained, "score", baseline, level)
        for column, name in _COMPARISON.items():
            table[name.format(baseline)] = gains[column]
    by_arm = trained.groupby("arm", sort=False)
    means = by_arm[["steps", "flops"]].mean(numeric_only=False)
    if "test.agreement" in trained:
        means["agreement"] = by_arm["test.agreement"].mean()
    table = table.join(means, on="arm")
    if teacher is not None and "none" in arms:
        closed = [_gap_closed(trained, arm, teacher, level) for arm in table["arm"]]
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


def _gap_closed(trained: pd.DataFrame, arm: str, teacher: float, level: float) -> tuple[float, float, float]:
    scores = {name: trained[trained["arm"] == name].set_index("seed")["score"].sort_index() for name in (arm, "none")}
    common = scores[arm].index.intersection(scores["none"].index)
    if arm == "none" or common.empty:
        return (math.nan,) * 3
    closed = gap_closed(scores[arm][common], scores["none"][common], float(teacher), level)
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
