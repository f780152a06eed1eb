"""Calibration, what quantizing does layer by layer, and where memory goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fakit.figures.drawing import canvas, check_keys, distinct, label_width, note, records
from fakit.figures.figure import Figure
from fakit.figures.theme import BASELINE, ROLES, SMALL, TEXT, Role, model_role

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _style(name: str, position: int) -> Role:
    found = model_role(name)
    return found if found.letter in "TS" else ROLES[(0, 1, 4, 3, 2)[position % 5]]


def reliability(bins: Mapping[str, Any], title: str = "Calibration") -> Figure:
    """Accuracy against confidence by bin (on the diagonal = calibrated), and how many examples each bin holds.

    Args:
        bins: model name → rows confidence (mean of the bin, 0–1), accuracy (0–1), count; empty bins may be left out.
        title: short title.

    Raises:
        ValueError: nothing to draw, or rows without these columns.
    """
    check_keys(bins, "reliability")
    figure = canvas(title, (720, 480), {"t": 76, "b": 60}, barmode="group", bargap=0.1)
    diagonal = {"mode": "lines", "line": BASELINE.line(1.8), "hoverinfo": "skip"}
    figure.add_scatter(x=[0, 1], y=[0, 1], name="calibrated", **diagonal)
    parts = []
    for position, (name, table) in enumerate(bins.items()):
        rows = [row for row in records(table, ("confidence", "accuracy", "count"), "reliability") if row["count"] > 0]
        role = _style(name, position)
        confidence, accuracy, count = (
            np.array([row[key] for row in rows], float) for key in ("confidence", "accuracy", "count")
        )
        figure.add_scatter(
            x=confidence,
            y=accuracy,
            mode="lines+markers",
            name=name,
            line=role.line(),
            marker=role.marker(9),
            customdata=count,
            hovertemplate=f"{name}<br>confidence %{{x:.3f}}, accuracy %{{y:.3f}}<br>"
            "%{customdata:.0f} examples<extra></extra>",
        )
        share = count / count.sum()
        figure.add_scatter(
            x=confidence,
            y=100 * share,
            mode="lines+markers",
            line=role.line(1.5),
            marker=role.marker(6),
            showlegend=False,
            name=name,
            xaxis="x2",
            yaxis="y2",
            hovertemplate=f"{name}<br>%{{y:.1f}} % of the examples<extra></extra>",
        )
        parts.append(f"{name} {float(share @ np.abs(confidence - accuracy)):.3f}")
    figure.update_layout(
        xaxis={"range": (0, 1), "showticklabels": False, "anchor": "y"},
        yaxis={"domain": (0.34, 1), "range": (0, 1.02), "title": {"text": "accuracy"}},
        xaxis2={"range": (0, 1), "title": {"text": "confidence"}, "anchor": "y2"},
        yaxis2={"domain": (0, 0.26), "rangemode": "tozero", "title": {"text": "examples (%)"}, "anchor": "x2"},
    )
    return Figure(figure, f"Expected calibration error over these bins: {', '.join(parts)}.")


def memory_bars(
    parts: Mapping[str, Mapping[str, float]],
    limit: float | None = None,
    title: str = "Memory by part",
) -> Figure:
    """Stacked bars: what each set-up needs, by part.

    Args:
        parts: set-up → part (teacher, student, gradients, optimizer, activations …) → bytes.
        limit: bytes that the device has, drawn as a line.
        title: short title.

    Raises:
        ValueError: nothing to draw, or a negative size.
    """
    check_keys(parts, "memory_bars")
    totals = {name: float(sum(sizes.values())) for name, sizes in parts.items()}
    if wrong := [f"{name}/{part}" for name, sizes in parts.items() for part, size in sizes.items() if size < 0]:
        raise ValueError(f"sizes in bytes are not negative; found {', '.join(wrong)} below 0")
    scale, unit = next((pair for pair in UNITS if max(*totals.values(), limit or 0) >= pair[0]), UNITS[-1])
    setups, kinds = list(parts)[::-1], distinct(part for sizes in parts.values() for part in sizes)
    side = label_width(setups) + 16
    figure = canvas(title, (720, 190 + 44 * len(setups)), {"l": side, "t": 116, "r": 84}, barmode="stack", bargap=0.35)
    for position, kind in enumerate(kinds):
        role = _style(kind, position)
        figure.add_bar(
            y=setups,
            x=[parts[name].get(kind, 0.0) / scale for name in setups],
            orientation="h",
            name=kind,
            marker=role.bar(),
            hovertemplate=f"%{{y}}, {kind}: %{{x:.3g}} {unit}<extra></extra>",
        )
    top = max(*totals.values(), limit or 0) / scale
    figure.update_layout(
        legend={"y": 1 + 20 / (44 * len(setups) + 18)}
    )  # 20 px above the plot: the limit's label lies between
    for place, name in enumerate(setups):  # in a column of their own, where no line runs through them
        total, letters = f"{totals[name] / scale:.3g} {unit}", {"size": SMALL, "color": TEXT}
        note(figure, total, 1, place, xref="x domain", xanchor="left", xshift=8, font=letters)
    if limit is not None:
        line = {"color": TEXT, "width": 2, "dash": "dash"}
        figure.add_shape(type="line", x0=limit / scale, x1=limit / scale, y0=0, y1=1, yref="y domain", line=line)
        note(figure, f"limit {limit / scale:.3g} {unit}", limit / scale, 1, yref="y domain", yanchor="bottom", yshift=2)
    figure.update_xaxes(range=(0, 1.02 * top), title=f"memory ({unit})").update_yaxes(type="category", showgrid=False)
    listed = ", ".join(f"{name} {total / scale:.3g} {unit}" for name, total in totals.items())
    fits = (
        ""
        if limit is None
        else f"; within {limit / scale:.3g} {unit}: {', '.join(n for n, t in totals.items() if t <= limit) or 'none'}"
    )
    return Figure(figure, f"Memory: {listed}{fits}.")
