"""`report`: tables and figures of recorded runs, as files that open from disk without a network."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fakit.experiments.cells import RATE, gains_in_cells
from fakit.experiments.doctor import Diagnosis, diagnose
from fakit.experiments.map_report import map_report
from fakit.experiments.map_study import SIMILARITY
from fakit.experiments.statistics import Interval, crossed, main_effects
from fakit.experiments.store import RunStore
from fakit.experiments.table import BASELINES, compared_with, scale, study_table, to_markdown
from fakit.files import check_room, write_whole

if TYPE_CHECKING:
    from fakit.figures import Figure


@dataclass
class Report:
    """A finished report: prints itself in a terminal, draws itself in a notebook.

    Attributes:
        path: the folder written: report.html, report.md, table.csv, runs.csv, figures/NAME.svg.
        table: `study_table` of the runs, or `map_scores` of a map study. text: the report in markdown. figures:
            by name.
        diagnosis: what `diagnose` found in the runs; the last section of the text.
    """

    path: Path
    table: pd.DataFrame
    text: str
    figures: dict[str, Figure] = field(repr=False)
    diagnosis: Diagnosis = field(repr=False)

    def __str__(self) -> str:
        return f"{self.text}\nWritten to {self.path / 'report.html'}"

    def _repr_markdown_(self) -> str:
        return self.text


def report(
    runs_dir: str | Path | RunStore, out: str | Path | None = None, baselines: Sequence[str] | None = None
) -> Report:
    """Compare the runs of a directory and write what came out.

    Args:
        runs_dir: what `fakit distill` or `fakit study` wrote.
        out: the folder to write to; `runs_dir`/report by default.
        baselines: the arms that gains are paired against; by default "none" and, of a study that is not of maps,
            "outputs".

    Raises:
        ValueError: the folder holds no runs (says what was looked for and found), or none that is finished, or none of
            an arm of `baselines`.
    """
    store = runs_dir if isinstance(runs_dir, RunStore) else RunStore(runs_dir)
    folder = Path(out) if out is not None else store.path / "report"
    if len(store):
        check_room(folder, 2**20, "the report")
    if (store.path / SIMILARITY).is_file():
        table, text, figures = map_report(store, baselines)
    else:
        table = study_table(store, baselines)
        in_cells = _cells(store)
        figures = _cell_figures(store, in_cells) if in_cells is not None else study_figures(table)
        text = _text(store, table, figures, in_cells, start=(baselines or BASELINES)[0])
    diagnosis = diagnose(store, baselines)
    text = f"{text.rstrip()}\n\n## What the doctor found\n\n{diagnosis.markdown()}"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.save(folder / "figures" / f"{name}.svg")
    lists = [column for column in table if column == "scores" or column.startswith("gains_over_")]
    write_whole(folder / "table.csv", table.drop(columns=lists).to_csv(index=False))
    write_whole(folder / "runs.csv", store.runs().to_csv(index=False))
    write_whole(folder / "report.md", text)
    write_whole(folder / "report.html", _page(text, figures))
    return Report(folder, table, text, figures, diagnosis)


def study_figures(table: pd.DataFrame, baselines: Sequence[str] | None = None) -> dict[str, Figure]:
    """Figures of a `study_table`, those that its runs allow: intervals need two seeds, differences a baseline.

    Args:
        baselines: of those of the table the ones to draw differences from; all by default.
    """
    from fakit.figures import paired_differences, pareto, scores_by_arm

    runs = table[(table["kind"] == "run") & (table["n"] > 1)]
    if runs.empty:
        return {}
    runs = runs.assign(factor=[scale(metric)[0] for metric in runs["metric"]])
    titles = {row["task"]: f"{row['metric']}{scale(row['metric'])[1]}" for _, row in runs.iterrows()}
    scores = [_row(row, row["mean"], row["low"], row["high"], row["scores"]) for _, row in runs.iterrows()]
    figures = {"scores_by_arm": scores_by_arm(scores, references=_references(table), metrics=titles)}
    for baseline in compared_with(table) if baselines is None else baselines:
        gain = f"gain_over_{baseline}"
        compared = runs[runs[f"pairs_with_{baseline}"] > 1] if gain in runs else runs[:0]
        rows = [
            _row(row, row[gain], row[f"{gain}_low"], row[f"{gain}_high"], row[f"gains_over_{baseline}"])
            for _, row in compared.iterrows()
        ]
        if rows:
            axes = {task: f"gain in test {title.replace(' %', '')} (points)" for task, title in titles.items()}
            figures[f"gain_over_{baseline}"] = paired_differences(rows, baseline=baseline, metrics=axes)
    for task, rows in runs.dropna(subset=["flops"]).groupby("task", sort=False):
        label, quality = _quality(rows.iloc[0])
        points = [
            {
                "name": r["arm"],
                "cost": r["flops"] / 1e12,
                **dict(zip(("quality", "low", "high"), quality(r), strict=True)),
            }
            for _, r in rows.iterrows()
        ]
        name = f"pareto_{re.sub(r'[^a-z0-9]+', '_', str(task).lower()).strip('_')[-40:]}"
        same = sum(other == name or other.startswith(f"{name}_") for other in figures)
        figures[f"{name}_{same + 1}" if same else name] = pareto(
            points, "training compute (TFLOPs, teacher included)", label, title=f"{task}: what compute buys"
        )
    return figures


def _row(row: pd.Series, mean: float, low: float, high: float, seeds: list[float]) -> dict:
    f = row["factor"]
    return {
        "task": row["task"],
        "arm": row["arm"],
        "mean": f * mean,
        "low": f * low,
        "high": f * high,
        "seeds": [f * value for value in seeds],
    }


def _references(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The teacher, and the copied input where it is a baseline, for lines behind the scores."""
    names = {"teacher": "teacher", "copy": "input left as it is"}
    found: dict[str, dict[str, float]] = {}
    of_baselines = table[(table["kind"] == "baseline") & table["arm"].isin(names)]
    for _, row in of_baselines.dropna(subset=["mean"]).iterrows():
        found.setdefault(row["task"], {})[names[row["arm"]]] = scale(row["metric"])[0] * row["mean"]
    return found


def _quality(row: pd.Series) -> tuple[str, Callable[[pd.Series], tuple[float, float, float]]]:
    """An axis on which up is better: the score, or an error rate taken from 1, or a perplexity with its sign turned."""
    metric = row["metric"]
    factor, unit = scale(metric)
    if row["higher_is_better"]:
        return f"test {metric}{unit}", lambda r: (factor * r["mean"], factor * r["low"], factor * r["high"])
    top = 100.0 if factor == 100 else 0.0
    label = f"100 − test {metric}{unit}" if top else f"− test {metric}"
    return label, lambda r: (top - factor * r["mean"], top - factor * r["high"], top - factor * r["low"])


def _cells(store: RunStore) -> pd.DataFrame | None:
    """The gains in cells of a study that names what they are against, in the unit that they are shown in; None where it
    names nothing, or no cell is complete.
    """
    against, runs = store.manifest.get("against"), store.runs()
    if against is None:
        return None
    runs = runs[runs["kind"] == "run"]
    gains = gains_in_cells(runs, "score", against, store.manifest.get("arms"))
    if gains.empty:
        return None
    metrics = runs.groupby("task")["metric"].first()
    factors = gains["task"].map(lambda task: scale(metrics[task])[0])
    numbers = {key: factors * gains[key] for key in ("gain", "gain_low", "gain_high")}
    units = gains["task"].map(lambda task: f"points of {metrics[task]}" if scale(metrics[task])[1] else metrics[task])
    return gains.assign(unit=units, **numbers)


def _cell_figures(store: RunStore, in_cells: pd.DataFrame) -> dict[str, Figure]:
    from fakit.figures import gain_by_cell

    tasks = list(in_cells.groupby("task", sort=False))
    return {
        "gain_by_cell" if len(tasks) == 1 else f"gain_by_cell_{number}": gain_by_cell(
            rows, store.manifest["against"], rows["unit"].iloc[0]
        )
        for number, (_, rows) in enumerate(tasks, start=1)
    }


def _cell_tables(against: str, in_cells: pd.DataFrame) -> list[str]:
    """One table a task: a line a cell, a column a level; bold where the correction leaves it sure."""
    lines = []
    for task, rows in in_cells.groupby("task", sort=False):
        arms = list(dict.fromkeys(rows["arm"]))
        judged = rows["verdict"].value_counts()
        lines += [
            f"| {task}: gain over {against}, {rows['unit'].iloc[0]} | {' | '.join(arms)} |",
            f"|---|{'---|' * len(arms)}",
        ]
        for cell in dict.fromkeys(rows["cell"]):
            of = {row["arm"]: row for row in rows[rows["cell"] == cell].to_dict("records")}
            lines.append(f"| {', '.join(cell)} | {' | '.join(_gain_cell(of.get(arm)) for arm in arms)} |")
        lines += [
            "",
            f"{len(rows)} comparisons: {judged.get('gain', 0)} gains, {judged.get('loss', 0)} losses are sure (bold), "
            f"{judged.get('not sure', 0)} not; after Benjamini and Hochberg's correction for all, at {RATE}. In "
            "brackets: 95 % intervals over paired seeds, not corrected; positive is better.",
            "",
        ]
    return lines


def _gain_cell(row: Mapping[str, object] | None) -> str:
    if row is None:
        return "–"
    told = Interval(row["gain"], row["gain_low"], row["gain_high"], row["n"]).format(1.0, 1, sign=True)
    return f"**{told}**" if row["verdict"] != "not sure" else told


def _text(
    store: RunStore, table: pd.DataFrame, figures: dict[str, Figure], in_cells: pd.DataFrame | None, start: str
) -> str:
    manifest = store.manifest
    runs = table[table["kind"] == "run"]
    seeds = sorted({seed for of_arm in runs["seeds"] for seed in of_arm}) if len(runs) else []
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    machine = manifest["machine"]
    lines = [
        f"# {manifest['what']}",
        "",
        f"{int(runs['n'].sum())} runs, seeds {', '.join(map(str, seeds)) or 'none'}. Made {manifest['created']} with "
        f"{versions}; {machine['processor']}, {machine['threads']} of {machine['cores']} threads, GPU: "
        f"{machine['gpu'] or 'none'}.",
        "",
        *(_cell_tables(manifest["against"], in_cells) if in_cells is not None else []),
        to_markdown(table),
        "In brackets: 95 % intervals over seeds (Student t). Gains are paired by seed, in the metric's points; "
        f"positive is better. Gap closed: of the way from `{start}` to the teacher (Fieller's interval), – where the "
        "gap itself is not sure. TFLOPs: all of training, the teacher's forward passes included. In italics: "
        "baselines, one evaluation each.",
        "",
    ]
    lines += _effects(store, runs)
    if (without := runs[runs.get("no_score", 0) > 0]) is not None and len(without):
        said = "; ".join(f"{row['task']}, {row['arm']}: {row['no_score']:.0f}" for _, row in without.iterrows())
        lines += [f"Without a score, since the student gave NaN, and left out of every mean: {said}.", ""]
    lines += [f"![{figure.summary}](figures/{name}.svg)\n" for name, figure in figures.items()]
    if not figures:
        lines.append("No figure: intervals need at least two seeds of an arm.\n")
    return "\n".join(lines)


def _effects(store: RunStore, table: pd.DataFrame) -> list[str]:
    """What each factor is worth, for tasks whose arms are every combination of levels."""
    lines = []
    runs = store.runs()
    for task, rows in table.groupby("task", sort=False):
        arms = sorted(rows["arm"])  # of a study in its own order; records come in the order of finishing
        order = store.manifest.get("arms") or []
        cells = crossed(sorted(arms, key=lambda arm: order.index(arm) if arm in order else len(order)))
        own = runs[(runs["kind"] == "run") & (runs["task"] == task) & runs["arm"].isin(cells or ())]
        if cells is None or not _has_whole_seed(own, cells):
            continue
        metric = rows.iloc[0]["metric"]
        factor, unit = scale(metric)
        head = f"gain in {metric}{' (points)' if unit else ''}"
        lines += [f"| {task}: what a level is worth | {head} | p (Holm) | seeds |", "|---|---|---|---|"]
        for _, row in main_effects(own, "score", cells).iterrows():
            gain = Interval(row["gain"], row["gain_low"], row["gain_high"], row["n"])
            more = " (interaction)" if "×" in row["factor"] else ""
            p = "–" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.3f}"
            name = f"{row['level']} against {row['against']}{more}".replace("|", "\\|")
            lines.append(f"| {name} | {gain.format(factor, 2, sign=True)} | {p} | {row['n']} |")
        lines.append("")
    if lines:
        lines += [
            "Each level is averaged over the levels of the other factors, paired by seed; positive is better.",
            "",
        ]
    return lines


def _has_whole_seed(runs: pd.DataFrame, cells: Mapping[str, object]) -> bool:
    """Whether a seed has all arms."""
    by_seed = runs.dropna(subset=["score"]).groupby("seed")["arm"]
    return any(cells.keys() <= set(arms) for _, arms in by_seed)


_STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark
}
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #8886; padding: .3rem .6rem; text-align: left; font-variant-numeric: tabular-nums }
figure { margin: 1.5rem 0 } svg { max-width: 100%; height: auto }
"""


def _page(text: str, figures: dict[str, Figure]) -> str:
    """The same report as one HTML file, pictures inside it."""
    import mistune

    written = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    body = [mistune.create_markdown(plugins=["table"])(written)]
    for figure in figures.values():
        svg = figure.svg()
        caption = html.escape(figure.summary)
        body.append(f"<figure>{svg[svg.index('<svg') :]}<figcaption>{caption}</figcaption></figure>")
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
