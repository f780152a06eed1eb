"""`gains_in_cells`: what a term adds, in each cell of a crossed study by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pandas as pd
from scipy.stats import false_discovery_control

from fakit.experiments.statistics import paired_table

RATE = 0.05
"""A gain counts where its p, corrected by Benjamini and Hochberg for all comparisons of its task, is below this."""


def gains_in_cells(
    runs: pd.DataFrame, metric: str, against: str, arms: list[str] | None = None, level: float = 0.95
) -> pd.DataFrame:
    """The paired gain of each level of one factor over the level `against` of it, in every cell of the other factors.

    Arms are named as `vary: {kind: grid}` names them, by their levels, joined by ", ". Combinations may be left out.

    Args:
        runs: as for `paired_table`.
        metric: the column compared.
        against: a level, as "outputs".
        arms: of the study, in its own order; by default, those of the runs as they come.

    Returns:
        One row a task, cell and other level. Columns: task; cell, the names of the other factors' levels, in order;
        arm, the level; n pairs; gain, gain_low, gain_high, gains (one a pair), positive for "better"; p; p_adjusted
        (Benjamini and Hochberg, over all rows of the task); verdict: "gain", "loss" or "not sure", by `RATE`. Empty
        where no cell has the level and another beside it.

    Raises:
        ValueError: as `paired_table`; no arm, or more than one factor, that has the level.
    """
    order = list(arms) if arms is not None else list(dict.fromkeys(runs["arm"]))
    place, parts = factor_of(against, order), levels_of(order)
    rows = []
    for task, of_task in runs[runs["arm"].isin(parts)].groupby("task", sort=False):
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        there = set(of_task["arm"])
        for arm, of in parts.items():
            if arm in there:
                cells.setdefault((*of[:place], *of[place + 1 :]), {})[of[place]] = arm
        found = []
        for cell, levels in cells.items():
            if against in levels and len(levels) > 1:
                named = of_task[of_task["arm"].isin(levels.values())]
                table = paired_table(named, metric, levels[against], level).set_index("arm")
                found += [
                    {"task": task, "cell": cell, "arm": name, **_gain(table.loc[arm])}
                    for name, arm in levels.items()
                    if name != against
                ]
        rows += _judged(found)
    return pd.DataFrame(rows)


def levels_of(arms: Iterable[str]) -> dict[str, list[str]]:
    """Arm → its levels, for the arms that a grid names."""
    return {arm: arm.split(", ") for arm in arms if ", " in arm and not arm.endswith(", equal compute")}


def factor_of(level: str, arms: Iterable[str]) -> int:
    """Which of the factors of a grid has this level, counted from 0.

    Raises:
        ValueError: none, or several.
    """
    named = list(arms)
    places = {place for of in levels_of(named).values() for place, name in enumerate(of) if name == level}
    if len(places) != 1:
        raise ValueError(
            f"against: {level!r} was to be compared with in every cell, and is a level of {len(places) or 'none'} of "
            f"the factors of these arms: {'; '.join(named[:4])}{' …' if len(named) > 4 else ''}."
        )
    return places.pop()


def _gain(row: pd.Series) -> dict:
    kept = {key: row[key] for key in ("gain", "gain_low", "gain_high", "gains", "p")}
    return {"n": int(row["pairs"]), **kept}


def _judged(rows: list[dict]) -> list[dict]:
    tested = [row for row in rows if not math.isnan(row["p"])]
    adjusted = false_discovery_control([row["p"] for row in tested]) if tested else []
    by_row: Mapping[int, float] = {id(row): float(p) for row, p in zip(tested, adjusted, strict=True)}
    judged = []
    for row in rows:
        p = by_row.get(id(row), math.nan)
        sure = p < RATE  # nan: not sure
        verdict = ("gain" if row["gain"] > 0 else "loss") if sure else "not sure"
        judged.append(row | {"p_adjusted": p, "verdict": verdict})
    return judged
