"""Results of a study: paired differences, scores, retention, cost against quality, sensitivity to the weights.

All tables are DataFrames or lists of dicts with one row a (task, arm): `mean`, `low`, `high` are an estimate with its
95 % interval, computed elsewhere (`fakit.experiments.statistics`), and `seeds` holds the single values behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from fakit.figures.drawing import (
    axis_id,
    axis_key,
    band,
    canvas,
    distinct,
    interval,
    label_width,
    log_axis,
    note,
    panel_title,
    panels,
    records,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import BASELINE, TEACHER, TEXT, WIDE, Role, arm

COLUMNS = ("task", "arm", "mean", "low", "high")


def _seeds(row: Mapping[str, Any]) -> list[float]:
    found = row.get("seeds")
    return [] if found is None or np.isscalar(found) else [float(value) for value in found]


def _forest(rows: list[dict], title: str, tasks: list[str], arms: list[str], metrics: Mapping[str, str]) -> go.Figure:
    """One panel a task, one line an arm: interval, point, and the single seeds below it as small points."""
    side = label_width(arms) + 16
    figure = canvas(
        title, (WIDE if len(tasks) > 1 else 720, 150 + 40 * len(arms)), {"l": side, "t": 72}, showlegend=False
    )
    for number, (task, domain) in enumerate(zip(tasks, panels(len(tasks), 0.05), strict=True)):
        x, y = axis_id("x", number), axis_id("y", number)
        for row in rows:
            if row["task"] != task:
                continue
            place, role = len(arms) - 1 - arms.index(row["arm"]), arm(row["arm"], arms.index(row["arm"]))
            seeds = _seeds(row)
            hover = f"{row['arm']}, {task}<br>{row['mean']:.4g} (95 % interval {row['low']:.4g} to {row['high']:.4g})"
            if seeds:
                points = {"color": role.color, "size": 5, "symbol": "circle", "opacity": 0.75}
                spread = {"hovertemplate": f"{row['arm']}, {task}<br>one seed: %{{x:.4g}}<extra></extra>"}
                figure.add_scatter(
                    x=seeds, y=[place - 0.24] * len(seeds), mode="markers", marker=points, xaxis=x, yaxis=y, **spread
                )
            figure.add_scatter(
                x=[row["mean"]],
                y=[place],
                mode="markers",
                marker=role.marker(10),
                error_x=interval([row["mean"]], [row["low"]], [row["high"]], role.color, 2.2),
                hovertemplate=hover + "<extra></extra>",
                name=row["arm"],
                xaxis=x,
                yaxis=y,
            )
        ticks = {"tickvals": list(range(len(arms))), "ticktext": arms[::-1], "range": (-0.6, len(arms) - 0.4)}
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": y,
                    "title": {"text": metrics.get(task, "")},
                    "nticks": 6,
                },
                axis_key("y", number): {
                    "anchor": x,
                    "showgrid": False,
                    "zeroline": False,
                    "showticklabels": number == 0,
                    **ticks,
                },
            }
        )
        panel_title(figure, number, f"<b>{task}</b>" if len(tasks) > 1 else task)
    return figure


def _fit(figure: go.Figure, number: int, rows: list[dict], also: Iterable[float]) -> None:
    """A range for panel `number` that holds every interval, every seed and the values in `also`."""
    ends = [value for row in rows for value in (row["low"], row["high"], *_seeds(row))] + list(also)
    air = 0.06 * ((max(ends) - min(ends)) or 1)
    figure.update_layout({axis_key("x", number): {"range": (min(ends) - air, max(ends) + air), "zeroline": False}})


def paired_differences(
    table: Any,
    baseline: str = "none",
    metrics: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Figure:
    """What each arm gains over the baseline with the same seeds: dot, 95 % interval, single seeds, and a line at zero.

    Args:
        table: rows task, arm, mean, low, high (the paired difference, **positive = better**, in the metric's units) and
            `seeds`, the single differences.
        baseline: the arm that was subtracted, named in title and axis.
        metrics: task → axis title, e.g. {"scans": "CER saved (points)"}; by default "gain over {baseline}".
        title: short title.

    Raises:
        ValueError: an empty table or missing columns.
    """
    rows = records(table, COLUMNS, "paired_differences")
    tasks, arms = distinct(row["task"] for row in rows), distinct(row["arm"] for row in rows)
    axes = {task: (metrics or {}).get(task, f"gain over {baseline}") for task in tasks}
    figure = _forest(rows, title or f"Paired differences from ‘{baseline}’", tasks, arms, axes)
    for number, task in enumerate(tasks):
        mine = [row for row in rows if row["task"] == task]
        _fit(figure, number, mine, [0.0])
        line = {"color": TEXT, "width": 1.5, "dash": "dot"}
        x, y = axis_id("x", number), f"{axis_id('y', number)} domain"
        figure.add_shape(type="line", x0=0, x1=0, y0=0, y1=1, xref=x, yref=y, line=line, layer="below")
    sure = [
        f"{row['arm']} on {row['task']} {row['mean']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})"
        for row in rows
        if row["low"] > 0
    ]
    worse = sum(row["high"] < 0 for row in rows)
    counts = sorted({len(_seeds(row)) for row in rows} - {0})
    summary = (
        f"{len(sure)} of {len(rows)} differences from {baseline} lie above 0 with their whole 95 % interval, {worse} "
        "below" + (f": {'; '.join(sure)}." if sure else ".")
    )
    caption = "Bars: 95 % intervals of the paired difference; to the right of the dotted line is better."
    if counts:
        caption += f" Small points: single seeds ({'–'.join(map(str, distinct((counts[0], counts[-1]))))} an arm)."
    return Figure(figure, summary, caption)


def scores_by_arm(
    table: Any,
    references: Mapping[str, Mapping[str, float]] | None = None,
    metrics: Mapping[str, str] | None = None,
    title: str = "Scores by arm",
) -> Figure:
    """Each arm's score with interval and seeds; reference lines for the teacher and for trivial baselines.

    Args:
        table: rows task, arm, mean, low, high, `seeds`, in the metric's units.
        references: task → {"teacher": score, "leave as is": score}: vertical lines, the teacher's solid, others dotted.
        metrics: task → axis title, e.g. {"reviews": "accuracy", "scans": "CER (lower is better)"}.
        title: short title.

    Raises:
        ValueError: an empty table or missing columns.
    """
    rows = records(table, COLUMNS, "scores_by_arm")
    tasks, arms = distinct(row["task"] for row in rows), distinct(row["arm"] for row in rows)
    references = references or {}
    figure = _forest(rows, title, tasks, arms, metrics or {})
    lines = {name for task in tasks for name in references.get(task, {})}
    figure.update_layout(margin={"t": 72 + 18 * min(len(lines), 3)})
    for number, task in enumerate(tasks):
        _fit(figure, number, [row for row in rows if row["task"] == task], references.get(task, {}).values())
        for level, (name, value) in enumerate(references.get(task, {}).items()):
            role = TEACHER if name.lower().startswith("teacher") else BASELINE
            x, y = axis_id("x", number), f"{axis_id('y', number)} domain"
            figure.add_shape(
                type="line", x0=value, x1=value, y0=0, y1=1, xref=x, yref=y, line=role.line(1.8), layer="below"
            )
            text = f"{name} {value:.3g}"
            where = {
                "xref": f"{x} domain",
                "yref": y,
                "xanchor": "right",
                "yanchor": "bottom",
                "yshift": 4 + 16 * level,
            }
            note(figure, text, 1, 1, font={"size": 12, "color": role.color}, **where)
    best = [f"{task} {row['arm']} {row['mean']:.3g}" for task in tasks for row in rows if row["task"] == task]
    parts = [
        f"{task} teacher {references[task]['teacher']:.3g}" for task in tasks if "teacher" in references.get(task, {})
    ]
    seeds = "; small points: single seeds" if any(_seeds(row) for row in rows) else ""
    return Figure(figure, f"Mean scores: {', '.join(best + parts)}.", f"Bars: 95 % intervals{seeds}.")


def retention(table: Any, title: str = "Share of the teacher's score that is kept") -> Figure:
    """Bars from 0 to 100 %: the student's score over the teacher's, by task and arm.

    Args:
        table: rows task, arm, mean, low, high as fractions (1 = the teacher's score).
        title: short title.

    Raises:
        ValueError: an empty table or missing columns.
    """
    rows = records(table, COLUMNS, "retention")
    tasks, arms = distinct(row["task"] for row in rows), distinct(row["arm"] for row in rows)
    figure = canvas(title, (720, 380), {"t": 96}, barmode="group", bargap=0.25)
    for position, name in enumerate(arms):
        mine = {row["task"]: row for row in rows if row["arm"] == name}
        parts = [
            [100 * mine[task][key] if task in mine else np.nan for task in tasks] for key in ("mean", "low", "high")
        ]
        figure.add_bar(
            x=tasks,
            y=parts[0],
            name=name,
            marker=arm(name, position).bar(),
            error_y=interval(*parts, width=1.5),
            hovertemplate=f"{name}, %{{x}}: %{{y:.1f}} % of the teacher<extra></extra>",
        )
    top = max(100.0, *(100 * row["high"] for row in rows)) * 1.04
    figure.update_yaxes(range=(0, top), title="of the teacher's score (%)").update_xaxes(
        type="category", showgrid=False
    )
    line = {**TEACHER.line(1.8)}
    figure.add_shape(type="line", x0=0, x1=1, xref="x domain", y0=100, y1=100, line=line, layer="below")
    listed = ", ".join(f"{row['arm']} on {row['task']} {100 * row['mean']:.1f} %" for row in rows)
    return Figure(
        figure, f"Of the teacher's score, kept: {listed}.", "Bars: 95 % intervals; the line is the teacher, 100 %."
    )


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats (lower cost and at least its quality), by rising cost."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i]))
    front: list[int] = []
    for i in order:
        if not front or quality[i] > quality[front[-1]]:
            front.append(i)
    return front


def pareto(
    table: Any,
    cost_label: str = "parameters (millions)",
    quality_label: str = "accuracy",
    log: bool = True,
    title: str = "Cost against quality",
) -> Figure:
    """Each model or arm as a point; the step line joins those that no other beats.

    Args:
        table: rows name, cost, quality (**higher is better**) and, where known, low and high, the interval of quality.
        cost_label: axis title with unit.
        quality_label: axis title with unit.
        log: logarithmic cost.
        title: short title.

    Raises:
        ValueError: an empty table, missing columns, or a cost that a logarithm cannot show.
    """
    rows = records(table, ("name", "cost", "quality"), "pareto")
    if log and (wrong := [row["name"] for row in rows if row["cost"] <= 0]):
        raise ValueError(f"a logarithmic axis needs costs above 0; found {', '.join(wrong)}: pass log=False")
    figure = canvas(title, (720, 400 + 20 * ((len(rows) - 1) // 3)), {"t": 84 + 20 * ((len(rows) - 1) // 3)})
    cost, quality = [float(row["cost"]) for row in rows], [float(row["quality"]) for row in rows]
    front = pareto_front(cost, quality)
    line = {"color": TEXT, "dash": "dot", "width": 1.5, "shape": "hv"}
    figure.add_scatter(
        x=[cost[i] for i in front],
        y=[quality[i] for i in front],
        mode="lines",
        line=line,
        hoverinfo="skip",
        name="front",
        showlegend=False,
    )
    spare = ["x", "triangle-down", "cross", "diamond", "triangle-up", "square", "circle"]
    taken: set[str] = set()
    for position, row in enumerate(rows):  # named in the legend: points of like cost and quality leave labels no room
        role: Role = TEACHER if "teacher" in row["name"].lower() else arm(row["name"], position)
        symbol = role.symbol if role.symbol not in taken else next((s for s in spare if s not in taken), role.symbol)
        taken.add(symbol)
        low, high = row.get("low", row["quality"]), row.get("high", row["quality"])
        figure.add_scatter(
            x=[row["cost"]],
            y=[row["quality"]],
            mode="markers",
            marker=role.marker(11) | {"symbol": symbol},
            error_y=interval([row["quality"]], [low], [high], role.color),
            name=row["name"],
            showlegend=True,
            hovertemplate=f"{row['name']}<br>{cost_label}: %{{x:.4g}}<br>{quality_label}: %{{y:.4g}}<extra></extra>",
        )
    if log:
        figure.update_xaxes(**log_axis(cost, 0.12))
    else:
        pad = 0.12 * ((max(cost) - min(cost)) or 1)
        figure.update_xaxes(range=(min(cost) - pad, max(cost) + pad))
    figure.update_xaxes(title=f"{cost_label} (log)" if log else cost_label).update_yaxes(title=quality_label)
    best = "; ".join(f"{rows[i]['name']} ({cost[i]:.3g}, {quality[i]:.3g})" for i in front)
    return Figure(
        figure, f"{len(front)} of {len(rows)} are beaten by no other ({cost_label}, {quality_label}): {best}."
    )


def weight_sensitivity(
    table: Any, quality_label: str = "accuracy", title: str = "Sensitivity to the weights"
) -> Figure:
    """The score against one term's weight, the others held; one panel a term.

    Args:
        table: rows term, weight (≥ 0), mean, low, high and `seeds` (the single scores).
        quality_label: axis title with unit.
        title: short title.

    Raises:
        ValueError: an empty table or missing columns.
    """
    rows = records(table, ("term", "weight", "mean", "low", "high"), "weight_sensitivity")
    terms = distinct(row["term"] for row in rows)
    figure = canvas(title, (WIDE if len(terms) > 1 else 720, 380), {"t": 72}, showlegend=False)
    parts = []
    ends = [value for row in rows for value in (row["low"], row["high"], *_seeds(row))]
    air = 0.06 * ((max(ends) - min(ends)) or 1)
    for number, (term, domain) in enumerate(zip(terms, panels(len(terms), 0.04), strict=True)):
        mine = sorted((row for row in rows if row["term"] == term), key=lambda row: row["weight"])
        role = arm(term, number)
        where = {"xaxis": axis_id("x", number), "yaxis": axis_id("y", number)}
        x = np.arange(len(mine), dtype=float)  # one step a tried weight: 0 has no place on a logarithm
        mean, low, high = ([row[key] for row in mine] for key in ("mean", "low", "high"))
        figure.add_trace(band(x, low, high, role, number))
        for position, row in enumerate(mine):
            seeds = _seeds(row)
            points = {"color": role.color, "size": 4, "opacity": 0.7}
            figure.add_scatter(
                x=[position] * len(seeds), y=seeds, mode="markers", marker=points, hoverinfo="skip", **where
            )
        figure.add_scatter(
            x=x,
            y=mean,
            mode="lines+markers",
            line=role.line(),
            marker=role.marker(9),
            customdata=[row["weight"] for row in mine],
            hovertemplate=f"{term} weight %{{customdata:g}}<br>{quality_label} %{{y:.4g}}<extra></extra>",
            name=term,
            **where,
        )
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": where["yaxis"],
                    "tickvals": x,
                    "ticktext": [f"{row['weight']:g}" for row in mine],
                    "title": {"text": "weight"},
                    "range": (-0.4, len(mine) - 0.6),
                    "zeroline": False,
                },
                axis_key("y", number): {
                    "anchor": where["xaxis"],
                    "range": (min(ends) - air, max(ends) + air),
                    "showticklabels": number == 0,
                    "title": {"text": quality_label if number == 0 else ""},
                    "zeroline": min(ends) < 0 < max(ends),  # of changes, none
                },
            }
        )
        panel_title(figure, number, f"<b>{term}</b>")
        best = max(mine, key=lambda row: row["mean"])
        parts.append(
            f"{term} best at weight {best['weight']:g} ({best['mean']:.3g}), range {max(mean) - min(mean):.2g}"
        )
    return Figure(
        figure, f"{quality_label} by weight: {'; '.join(parts)}.", "Bands: 95 % intervals; small points: single seeds."
    )
