"""Runs side by side: their curves over the steps, and what each costs against how good it is;
the chosen ones stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fakit.figures.drawing import axis_id, axis_key, canvas, distinct, panel_title, panels, records
from fakit.figures.figure import Figure
from fakit.figures.theme import ARMS, BASELINE, TEACHER, TEXT, WIDE, Role, arm

COLUMNS = ("run_id", "arm", "seed", "cost", "quality", "steps", "values", "chosen")


def run_role(name: str) -> Role:
    """How an arm's runs are drawn: a study's arms as everywhere; the teacher and other baselines,
    which have no curve, by marks of their own.
    """
    if name.split()[0].strip(",") in ARMS:
        return arm(name)
    return replace(TEACHER, symbol="x") if "teacher" in name else replace(BASELINE, symbol="triangle-down")


def runs_overview(
    runs: Any,
    front: Sequence[tuple[float, float]] = (),
    curve_label: str = "loss",
    cost_label: str = "parameters (millions)",
    quality_label: str = "accuracy",
    higher_is_better: bool = True,
    title: str = "Runs",
) -> Figure:
    """Two panels: one line a run over its steps, and one point a run, cost against quality;
    the dotted line is the front.

    Args:
        runs: rows run_id, arm, seed, cost (None or NaN: not recorded, no point), quality (likewise), steps and values
            (the curve, may be empty), chosen. Where some are chosen the others fade.
        front: (cost, quality) by rising cost, joined by the step line.
        curve_label, cost_label, quality_label: axis titles with units.
        higher_is_better: False turns the quality axis around, so that up is better in any case.
        title: short title.

    Raises:
        ValueError: no runs, or rows without these columns.
    """
    rows = records(runs, COLUMNS, "runs_overview")
    arms = distinct(row["arm"] for row in rows)
    some = any(row["chosen"] for row in rows)
    figure = canvas(title, (WIDE, 420), {"t": 96})
    named: set[str] = set()
    for row in rows:
        role = run_role(row["arm"])
        faded = some and not row["chosen"]
        hover = f"{row['arm']}, seed {row['seed']}"
        look = {"opacity": 0.25 if faded else 1.0, "legendgroup": row["arm"], "name": row["arm"]}
        if len(row["steps"]):
            figure.add_scatter(
                x=list(row["steps"]),
                y=[np.nan if value is None else value for value in row["values"]],
                mode="lines",
                line=role.line(3 if row["chosen"] else 1.5),
                showlegend=row["arm"] not in named and not faded,
                hovertemplate=f"{hover}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
                **look,
            )
            named |= set() if faded else {row["arm"]}
        if _known(row["cost"]) and _known(row["quality"]):
            figure.add_scatter(
                x=[row["cost"]],
                y=[row["quality"]],
                mode="markers",
                marker=role.marker(13 if row["chosen"] else 8),
                showlegend=False,
                hovertemplate=f"{hover}<br>{cost_label}: %{{x:.4g}}<br>{quality_label}: %{{y:.4g}}<extra></extra>",
                xaxis="x2",
                yaxis="y2",
                **look,
            )
    line = {"color": TEXT, "dash": "dot", "width": 1.5, "shape": "hv"}
    steps = {"x": [cost for cost, _ in front], "y": [quality for _, quality in front]}
    figure.add_scatter(
        **steps, mode="lines", line=line, name="front", showlegend=False, hoverinfo="skip", xaxis="x2", yaxis="y2"
    )
    titles = ((("step", curve_label), "curves"), ((cost_label, quality_label), "cost against quality"))
    for number, (domain, ((x, y), heading)) in enumerate(zip(panels(2, 0.12), titles, strict=True)):
        upside_down = number == 1 and not higher_is_better
        figure.update_layout(
            {
                axis_key("x", number): {"domain": domain, "anchor": axis_id("y", number), "title": {"text": x}},
                axis_key("y", number): {"anchor": axis_id("x", number), "title": {"text": y}, "zeroline": False}
                | ({"autorange": "reversed"} if upside_down else {}),
            }
        )
        panel_title(figure, number, heading)
    figure.update_layout(legend={"y": 1.09})
    return Figure(figure, _summary(rows, arms, front, quality_label, higher_is_better))


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _summary(rows: list[dict], arms: list[str], front: Sequence, quality_label: str, higher_is_better: bool) -> str:
    chosen = [row for row in rows if row["chosen"]]
    scored = [row for row in chosen or rows if _known(row["quality"])]
    of_chosen = f" of {len(chosen)} chosen" if chosen else ""
    if scored:
        best = (max if higher_is_better else min)(scored, key=lambda row: row["quality"])
        told = f"the best{of_chosen} is {best['arm']}, seed {best['seed']}, {quality_label} {best['quality']:.3g}"
        if missing := len(chosen or rows) - len(scored):
            told += f"; {missing} have no score"
    else:
        told = f"{of_chosen} no score is recorded".strip()
    return f"{len(rows)} runs of {len(arms)} arms; {told}; {len(front)} arms are on the front."
