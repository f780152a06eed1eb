"""Does a layer map's similarity predict the student's quality? Every map as a point, a panel a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fakit.figures.drawing import (
    axis_id,
    axis_key,
    canvas,
    check_keys,
    distinct,
    interval,
    note,
    panel_title,
    panels,
    records,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, SMALL, STUDENT, WIDE, Role

STYLES: dict[str, Role] = {"increasing": ALIGNED, "none": BASELINE, "reverse": STUDENT, "random": EXTRA}
COLUMNS = ("task", "map", "kind", "cka", "score")


def map_experiment(
    table: Any,
    correlations: Mapping[str, Any] | None = None,
    metrics: Mapping[str, str] | None = None,
    title: str = "Does a map's CKA predict its student?",
) -> Figure:
    """Test quality against the mean CKA of a map's pairs: one panel a task, one point a map, the controls marked.

    Args:
        table: rows task, map (its name), kind ("increasing", "none", "reverse", "random"), cka (mean over the map's
            pairs, student at its start; NaN for "none", which becomes a line) and score (mean over paired seeds); where
            known low and high, its interval, and scores, the single seeds, shown on hover; higher_is_better, one value
            a task, False for error rates, whose axis is reversed so that the better map is the upper one, True unless
            given. `fakit.experiments.map_scores` gives it.
        correlations: task → Spearman's ρ of CKA and quality (an error rate with its sign turned) over the increasing
            maps, with .mean, .low, .high and .n (`fakit.experiments.map_report.map_correlations`);
            written in the panel.
        metrics: task → axis title, by default "test score".
        title: short title.

    Raises:
        ValueError: no rows or missing columns, a kind that is not known, a correlation of a task that is not there, a
            map other than "none" without a CKA, or a task whose scores are better both ways.
    """
    rows = records(table, COLUMNS, "map_experiment")
    tasks, correlations = distinct(row["task"] for row in rows), dict(correlations or {})
    if unknown := sorted({row["kind"] for row in rows} - set(STYLES)):
        raise ValueError(f"kinds {unknown} are not known; a map is one of {', '.join(STYLES)}")
    if missing := [row["map"] for row in rows if row["kind"] != "none" and not np.isfinite(row["cka"])]:
        raise ValueError(f"maps {missing} have no CKA: only 'none' has no pairs to measure")
    if extra := [task for task in correlations if task not in tasks]:
        raise ValueError(f"correlations of {extra}, but the tasks are {tasks}")
    check_keys({row["task"]: 1 for row in rows if row["kind"] == "increasing"}, "map_experiment: increasing maps")
    higher = {task: _higher_is_better(task, rows) for task in tasks}
    figure = canvas(title, (WIDE if len(tasks) > 1 else 720, 440), {"t": 104, "b": 60}, legend={"y": 1.08})
    named: set[str] = set()
    sentences = []
    for number, (task, domain) in enumerate(zip(tasks, panels(len(tasks), 0.09), strict=True)):
        mine = [row for row in rows if row["task"] == task]
        x, y = axis_id("x", number), axis_id("y", number)
        low, high = _limits([row["cka"] for row in mine if row["kind"] != "none"], 0.08)
        for kind, role in STYLES.items():
            of_kind = [row for row in mine if row["kind"] == kind]
            if not of_kind:
                continue
            look = {"name": _LABELS[kind], "legendgroup": kind, "showlegend": kind not in named, "xaxis": x, "yaxis": y}
            named.add(kind)
            hover = [_hover(row) for row in of_kind]
            if kind == "none":
                score = of_kind[0]["score"]
                level = {"x": [low, high], "y": [score] * 2, "hovertext": hover * 2}
                figure.add_scatter(**level, mode="lines", line=role.line(), hoverinfo="text", **look)
                continue
            score = [row["score"] for row in of_kind]
            bars = [[row.get(end, row["score"]) for row in of_kind] for end in ("low", "high")]
            figure.add_scatter(
                x=[row["cka"] for row in of_kind],
                y=score,
                mode="markers",
                marker=role.marker(11 if kind == "increasing" else 13),
                error_y={**interval(score, *bars, role.color, 1.2), "width": 0},
                hovertext=hover,
                hoverinfo="text",
                **look,
            )
        ends = [row.get(end, row["score"]) for row in mine for end in ("low", "high")]
        bottom, top = _limits(ends, 0.12)
        title_y = (metrics or {}).get(task, "test score")
        if not higher[task]:
            bottom, top, title_y = top, bottom, f"{title_y} (reversed: lower is better)"
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": y,
                    "range": (low, high),
                    "nticks": 6,
                    "title": {"text": "mean CKA of the map's pairs"},
                },
                axis_key("y", number): {
                    "anchor": x,
                    "range": (bottom, top),
                    "zeroline": False,
                    "nticks": 7,
                    "title": {"text": title_y},
                },
            }
        )  # fmt: skip
        said = f"<b>{task}</b>"
        if task in correlations:
            found = correlations[task]
            said += f": Spearman ρ {found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        panel_title(figure, number, said)
        _name_extremes(figure, mine, number, higher[task])
        sentences.append(_sentence(task, mine, correlations.get(task), higher[task]))
    caption = "Each point: a map of every student layer to a teacher layer of its own, mean over paired seeds."
    if any("low" in row for row in rows):
        caption += " Bars: 95 % intervals free of what a seed does to all maps."
    if correlations:
        counts = sorted({found.n for found in correlations.values()})
        caption += (
            f" ρ over the {' or '.join(map(str, counts))} increasing maps, 95 % interval by resampling maps and seeds."
        )
        if not all(higher[task] for task in correlations):
            caption += (
                " Its sign is that of CKA and quality: positive where similar maps do better, also of error rates."
            )
    return Figure(figure, " ".join(sentences), caption)


_LABELS = {"increasing": "increasing map", "none": "none (no map)", "reverse": "reverse", "random": "random"}


def _limits(values: list[float], air: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = air * ((high - low) or 0.1)
    return low - pad, high + pad


def _hover(row: Mapping[str, Any]) -> str:
    parts = [f"map {row['map']}", "no pairs" if row["kind"] == "none" else f"mean CKA {row['cka']:.3f}"]
    said = f"test score {row['score']:.4g}"
    if "low" in row:
        said += f" (95 % interval {row['low']:.4g} to {row['high']:.4g})"
    parts.append(said)
    if row.get("scores") is not None:
        parts.append("seeds " + ", ".join(f"{score:.4g}" for score in row["scores"]))
    return "<br>".join(parts)


def _higher_is_better(task: str, rows: list[dict]) -> bool:
    """Which way the scores of a task are better; True where its rows do not say."""
    said = {bool(row.get("higher_is_better", True)) for row in rows if row["task"] == task}
    if len(said) > 1:
        raise ValueError(
            f"higher_is_better of {task} is both True and False: one panel shows one metric; give a value a task"
        )
    return said.pop()


def _extremes(rows: list[dict], higher: bool) -> tuple[dict, dict, list[dict]]:
    """Of the increasing maps: the one of the largest CKA, the best one, and all from worst to best."""
    sign = 1 if higher else -1
    increasing = sorted((row for row in rows if row["kind"] == "increasing"), key=lambda row: sign * row["score"])
    return max(increasing, key=lambda row: row["cka"]), increasing[-1], increasing


def _name_extremes(figure: Any, rows: list[dict], number: int, higher: bool) -> None:
    """Write the name of the best map above its bar, and of the one that CKA would choose below its own."""
    chosen, best, _ = _extremes(rows, higher)
    top, bottom = ("high", "low") if higher else ("low", "high")  # a reversed axis has the low end on top
    where = {
        "xref": axis_id("x", number),
        "yref": axis_id("y", number),
        "font": {"size": SMALL, "color": ALIGNED.color},
    }
    note(figure, best["map"], best["cka"], best.get(top, best["score"]), yanchor="bottom", yshift=1, **where)
    if chosen is not best:
        end = chosen.get(bottom, chosen["score"])
        note(figure, chosen["map"], chosen["cka"], end, yanchor="top", yshift=-10, **where)


def _sentence(task: str, rows: list[dict], found: Any, higher: bool) -> str:
    chosen, best, increasing = _extremes(rows, higher)
    place = len(increasing) - increasing.index(chosen)
    said = f"{task}: " if higher else f"{task} (lower is better): "
    if found is not None:
        said += f"Spearman ρ {found.mean:.2f} (95 % interval {found.low:.2f} to {found.high:.2f}) over {found.n} maps; "
    said += f"the map of the largest CKA, {chosen['map']}, scores {chosen['score']:.4g} "
    said += f"and comes {_ordinal(place)} of {len(increasing)}, "
    said += f"the best, {best['map']}, {best['score']:.4g}"
    controls = [f"{row['kind']} {row['score']:.4g}" for row in rows if row["kind"] != "increasing"]
    return said + (f"; {', '.join(controls)}." if controls else ".")


def _ordinal(place: int) -> str:
    last = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{last}"
