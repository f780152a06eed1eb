"""The report of a map study: every map's score and student, what the controls reach,
and whether the one predicts the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fakit.experiments.map_study import map_scores, recorded_similarity, whole_seeds
from fakit.experiments.statistics import Interval, paired_difference, spearman_interval
from fakit.experiments.store import RunStore
from fakit.experiments.table import scale
from fakit.figures import Figure, map_experiment
from fakit.layer_maps import LayerMap


def map_correlations(table: pd.DataFrame) -> dict[str, Interval]:
    """Task → Spearman's ρ of CKA and test score over the increasing maps of `map_scores`; positive:
    similar maps teach better.
    """
    found = {}
    for task, rows in table[table["kind"] == "increasing"].groupby("task", sort=False):
        sign = 1 if rows["higher_is_better"].iloc[0] else -1
        found[task] = spearman_interval(rows["cka"], [[sign * score for score in scores] for scores in rows["scores"]])
    return found


def map_report(store: RunStore, baselines: Sequence[str] | None = None) -> tuple[pd.DataFrame, str, dict[str, Figure]]:
    """The table of `map_scores`, the report in markdown, which names the seeds that were left out, and its figure."""
    table = map_scores(store.path)
    correlations = map_correlations(table)
    rows = table.assign(score=table["score"] * table["metric"].map(lambda metric: scale(metric)[0]))
    titles = {row["task"]: f"test {row['metric']}{scale(row['metric'])[1]}" for _, row in table.iterrows()}
    figure = map_experiment(rows.drop(columns="scores"), correlations, titles)
    manifest = store.manifest
    seeds = sorted({seed for of_map in table["seeds"] for seed in of_map})
    head = [
        f"# {manifest['what']}",
        "",
        f"{len(store)} runs, seeds {', '.join(map(str, seeds))}, made {manifest['created']} on "
        f"{manifest['machine']['processor']}.",
        "",
    ]
    if unfinished := whole_seeds(store.path)[1]:
        head += [f"Left out, since maps are missing: {'; '.join(map(str, unfinished))}.", ""]
    body = map_markdown(table, correlations, recorded_similarity(store.path), baselines or ("none",))
    return table, "\n".join([*head, body, f"![{figure.summary}](figures/maps.svg)\n"]), {"maps": figure}


def map_markdown(
    table: pd.DataFrame,
    correlations: dict[str, Interval],
    similarity: dict[str, list],
    baselines: Sequence[str] = ("none",),
) -> str:
    """For each task: the correlation, what CKA would have chosen, and all maps from best to worst with paired
    gains over the maps of `baselines`.

    Raises:
        ValueError: a map that would have been chosen, or one of `baselines`, is not in the table.
    """
    lines = []
    for task, rows in table.groupby("task", sort=False):
        factor, unit = scale(rows["metric"].iloc[0])
        sign = 1 if rows["higher_is_better"].iloc[0] else -1
        rows = rows.iloc[(-sign * rows["score"]).argsort(kind="stable")]
        increasing = rows.loc[rows["kind"] == "increasing", "map"].tolist()  # best first
        depths = [size - 1 for size in np.shape(similarity[task])]
        chosen = {
            "the monotone map of highest CKA": LayerMap.from_similarity(similarity[task], "monotone"),
            "`uniform`": LayerMap.uniform(*depths),
            "`last`": LayerMap.last(*depths),
        }
        places = [
            f"{name} ({_name(layer_map)}) is number {_place(_name(layer_map), increasing, task)}"
            for name, layer_map in chosen.items()
        ]
        rho = correlations[task]
        verdict = "not significantly different from 0"
        if rho.low > 0 or rho.high < 0:
            verdict = f"more similar maps teach {'better' if rho.low > 0 else 'worse'}"
        lines += [
            f"**{task}**: Spearman's ρ of CKA and test {rows['metric'].iloc[0]} over {rho.n} increasing maps is "
            f"{rho.format(digits=2, sign=True)}: {verdict}.",
            f"Of the {rho.n}, {'; '.join(places)}.",
            "",
            f"| {task}: S1-S2-… learn from T | mean CKA | test "
            f"{rows['metric'].iloc[0]}{unit}{'' if sign > 0 else ' (lower is better)'} | "
            f"{''.join(f'paired gain over {name} | ' for name in baselines)}agreement |",
            "|---|---|---|" + "---|" * len(baselines) + "---|",
        ]
        for _, row in rows.iterrows():
            gains = "".join(f"{_gain(row, rows, name, factor, sign)} | " for name in baselines)
            name = row["map"] if row["kind"] == "increasing" else f"*{row['map']}*"
            cka = "–" if np.isnan(row["cka"]) else f"{row['cka']:.2f}"
            lines.append(f"| {name} | {cka} | {factor * row['score']:.1f} | {gains}{100 * row['agreement']:.1f} % |")
        lines.append("")
    return "\n".join(lines)


def _gain(row: pd.Series, rows: pd.DataFrame, baseline: str, factor: float, sign: int) -> str:
    of_baseline = rows[rows["map"] == baseline]
    if of_baseline.empty:
        raise ValueError(f"baselines: {baseline!r} is not among the maps, which are {', '.join(rows['map'])}.")
    scores = of_baseline.iloc[0]["scores"]
    if row["map"] == baseline or len(scores) < 2:
        return "–"
    better, worse = (row["scores"], scores)[::sign]
    return paired_difference(better, worse).format(factor, digits=1, sign=True)


def _place(name: str, increasing: list[str], task: str) -> int:
    if name not in increasing:
        raise ValueError(
            f"map {name} is not among the {len(increasing)} increasing maps of {task}: the table and the similarity "
            "are of different studies, or rows were taken out. Give both as `map_scores` and `recorded_similarity` of "
            "one folder."
        )
    return increasing.index(name) + 1


def _name(layer_map: LayerMap) -> str:
    return "-".join(str(t) for _, t in layer_map)
