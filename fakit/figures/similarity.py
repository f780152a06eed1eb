"""Similarity of representations: the teacher × student heatmap with its null, estimator bias, rogue dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fakit.figures.drawing import (
    axis_id,
    axis_key,
    band,
    canvas,
    check_keys,
    color_bar,
    hatch,
    heat_axes,
    matrix,
    names,
    outline,
    panel_title,
    panels,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, HEATMAP, PAIR, SIMILARITY, SMALL, pattern
from fakit.figures.ticks import thinned


def similarity_heatmap(
    values: Any,
    student_labels: Sequence[str] | None = None,
    teacher_labels: Sequence[str] | None = None,
    null: Any = None,
    low: Any = None,
    high: Any = None,
    map_pairs: Sequence[tuple[int, int]] | None = None,
    title: str = "Similarity of layers (debiased CKA)",
    measure: str = "CKA",
) -> Figure:
    """Student layers (rows, S0 at the bottom) against teacher layers (columns): cividis, always from 0 to 1.

    Args:
        values: (S + 1, T + 1), rows and columns by layer number; NaN where undefined.
        student_labels: S + 1 names, by default S0, S1 …
        teacher_labels: T + 1 names, by default T0, T1 …
        null: the null's upper bound (e.g. its 97.5 % quantile under permutation), a number or (S + 1, T + 1); cells at
            or below it are hatched: no more similar than unrelated sequences.
        low: lower end of each cell's 95 % interval, (S + 1, T + 1), shown on hover.
        high: its upper end.
        map_pairs: (row, column) cells to outline: the layer map in force.
        title: short title.
        measure: the name of what is shown, for color bar and hover.

    Raises:
        ValueError: shapes or numbers of labels that do not agree.
    """
    values = matrix(values, "values")
    rows, columns = (
        names(student_labels, values.shape[0], "S", "student_labels"),
        names(teacher_labels, values.shape[1], "T", "teacher_labels"),
    )
    extra = {}
    for name, other in (("null", null), ("low", low), ("high", high)):
        if other is not None:
            extra[name] = np.asarray(other, float)
            if extra[name].shape not in ((), values.shape):
                raise ValueError(
                    f"{name} has shape {extra[name].shape}, values has {values.shape}: give one number a cell"
                )
            extra[name] = np.broadcast_to(extra[name], values.shape)
    figure = canvas(title, HEATMAP, {"l": 66, "r": 92, "t": 64, "b": 56})
    hover = [
        [_hover(rows[i], columns[j], measure, values[i, j], extra, i, j) for j in range(len(columns))]
        for i in range(len(rows))
    ]
    roomy = (HEATMAP[0] - 158) / len(columns) >= 34
    cells = [["–" if np.isnan(v) else f"{v:.2f}".replace("-0.00", "0.00") for v in row] for row in values]
    figure.add_heatmap(
        z=values,
        zmin=0,
        zmax=1,
        colorscale=SIMILARITY,
        colorbar=color_bar(measure),
        text=cells if roomy else None,
        texttemplate="%{text}" if roomy else None,
        textfont={"size": SMALL},
        hovertext=hover,
        hoverinfo="text",
    )
    heat_axes(figure, rows, columns)
    figure.update_xaxes(title="teacher layer").update_yaxes(title="student layer")
    inside = values <= extra["null"] if "null" in extra else np.zeros(values.shape, bool)
    if strokes := hatch(inside):
        figure.add_trace(strokes)
    for row, column in map_pairs or ():
        if not (0 <= row < len(rows) and 0 <= column < len(columns)):
            raise ValueError(f"map pair ({row}, {column}) is outside the {values.shape[0]} × {values.shape[1]} matrix")
        outline(figure, row, column)
    return Figure(
        figure,
        _heat_summary(values, rows, columns, inside, extra, map_pairs, measure),
        _heat_caption(inside, extra, map_pairs),
    )


def similarity_panels(
    values: Mapping[str, Any],
    nulls: Mapping[str, Any] | None = None,
    student_labels: Sequence[str] | None = None,
    teacher_labels: Sequence[str] | None = None,
    map_pairs: Sequence[tuple[int, int]] | None = None,
    title: str = "Similarity of layers",
    measure: str = "CKA",
) -> Figure:
    """Two or three heatmaps of one pair of depths side by side, on one scale from 0 to 1: estimators, students,
    before and after.

    Args:
        values: heading of a panel → (S + 1, T + 1), rows and columns by layer number.
        nulls: heading → the null's upper bound, a number or (S + 1, T + 1); cells at or below it are hatched.
        student_labels: S + 1 names, by default S0, S1 …
        teacher_labels: T + 1 names, by default T0, T1 …
        map_pairs: (row, column) cells to outline in every panel.
        title: short title.
        measure: the name of what is shown.

    Raises:
        ValueError: not two or three panels, matrices of different shapes, or a null for a panel that is not there.
    """
    drawn = {name: matrix(part, name) for name, part in values.items()}
    shapes = {name: part.shape for name, part in drawn.items()}
    if not 2 <= len(drawn) <= 3 or len(set(shapes.values())) > 1:
        raise ValueError(f"two or three matrices of one shape stand side by side; found {shapes}")
    bounds = {
        name: np.broadcast_to(np.asarray(part, float), shapes.get(name, ())) for name, part in (nulls or {}).items()
    }
    if unknown := [name for name in bounds if name not in drawn]:
        raise ValueError(f"nulls for {unknown}, but the panels are {list(drawn)}")
    shape = next(iter(shapes.values()))
    rows = names(student_labels, shape[0], "S", "student_labels")
    columns = names(teacher_labels, shape[1], "T", "teacher_labels")
    figure = canvas(title, PAIR, {"l": 66, "r": 92, "t": 76, "b": 56})
    roomy = (PAIR[0] - 158) / len(drawn) / len(columns) >= 34
    parts, hatched = [], False
    for number, ((name, part), domain) in enumerate(zip(drawn.items(), panels(len(drawn), 0.04), strict=True)):
        extra = {"null": bounds[name]} if name in bounds else {}
        anchors = {"domain": domain, "anchor": axis_id("y", number)}, {"anchor": axis_id("x", number)}
        figure.update_layout({axis_key("x", number): anchors[0], axis_key("y", number): anchors[1]})
        figure.add_heatmap(
            z=part,
            zmin=0,
            zmax=1,
            colorscale=SIMILARITY,
            showscale=number == 0,
            colorbar=color_bar(measure) if number == 0 else None,
            text=[["–" if np.isnan(v) else f"{v:.2f}".replace("-0.00", "0.00") for v in row] for row in part]
            if roomy
            else None,
            texttemplate="%{text}" if roomy else None,
            textfont={"size": SMALL},
            hovertext=[
                [f"{name}<br>" + _hover(r, c, measure, part[i, j], extra, i, j) for j, c in enumerate(columns)]
                for i, r in enumerate(rows)
            ],
            hoverinfo="text",
            xaxis=axis_id("x", number),
            yaxis=axis_id("y", number),
        )
        heat_axes(figure, rows, columns, number)
        figure.update_layout({axis_key("x", number): {"title": {"text": "teacher layer"}}})
        if number:
            figure.update_layout({axis_key("y", number): {"showticklabels": False}})
        inside = part <= extra["null"] if extra else np.zeros(shape, bool)
        if strokes := hatch(inside, number):
            figure.add_trace(strokes)
            hatched = True
        for row, column in map_pairs or ():
            outline(figure, row, column, number)
        panel_title(figure, number, name)
        finite = part[np.isfinite(part)]
        median = f"median {np.median(finite):.2f}" if len(finite) else "undefined throughout"
        mapped = (
            f", mapped pairs {np.nanmean([part[tuple(p)] for p in map_pairs]):.2f}" if map_pairs and len(finite) else ""
        )
        null = f", {int(inside.sum())} of {part.size} cells inside the null" if extra else ""
        parts.append(f"{name}: {median}{mapped}{null}")
    figure.update_layout(yaxis={"title": {"text": "student layer"}})
    caption = "Hatched: inside the null, no more similar than shuffled sequences. " if hatched else ""
    return Figure(
        figure, f"{measure}. {'; '.join(parts)}.", caption + ("Framed: the mapped pairs." if map_pairs else "")
    )


def _hover(row: str, column: str, measure: str, value: float, extra: dict, i: int, j: int) -> str:
    parts = [f"{row} and {column}", f"{measure} {value:.3f}" if np.isfinite(value) else f"{measure} undefined"]
    if "low" in extra and "high" in extra:
        parts.append(f"95 % interval {extra['low'][i, j]:.3f} to {extra['high'][i, j]:.3f}")
    if "null" in extra:
        where = "inside" if value <= extra["null"][i, j] else "above"
        parts.append(f"{where} the null (bound {extra['null'][i, j]:.3f})")
    return "<br>".join(parts)


def _heat_summary(values, rows, columns, inside, extra, pairs, measure) -> str:
    if np.isnan(values).all():
        return f"{measure} is undefined for every pair of layers."
    i, j = np.unravel_index(np.nanargmax(values), values.shape)
    text = f"Highest {measure} {values[i, j]:.2f} for {rows[i]} and {columns[j]}, median {np.nanmedian(values):.2f}"
    if "low" in extra and "high" in extra:
        text += f" (interval of the highest {extra['low'][i, j]:.2f} to {extra['high'][i, j]:.2f})"
    if "null" in extra:
        text += f"; {int(inside.sum())} of {values.size} cells lie inside the null"
    if pairs:
        text += f"; mean over the {len(pairs)} mapped pairs {np.nanmean([values[p] for p in map(tuple, pairs)]):.2f}"
    return text + "."


def _heat_caption(inside: np.ndarray, extra: dict, pairs: Any) -> str:
    parts = []
    if inside.any():
        parts.append("Hatched: inside the null, no more similar than shuffled sequences.")
    elif "null" in extra:
        parts.append("Every cell lies above the null: more similar than shuffled sequences.")
    if pairs:
        parts.append("Framed: the mapped pairs.")
    return " ".join(parts)


def bias_curve(
    n: Sequence[int],
    biased: Any,
    debiased: Any,
    truth: float | None = 0.0,
    title: str = "CKA of independent data",
) -> Figure:
    """What each estimator says against the number of rows, for data whose true CKA is known.

    Args:
        n: numbers of rows, (N,); drawn on a logarithmic axis.
        biased: (N,) or (seeds, N).
        debiased: (N,) or (seeds, N).
        truth: the true value, drawn as a line; None leaves it out.

    Raises:
        ValueError: an array whose last length is not N.
    """
    n = np.asarray(n, float)
    figure = canvas(title)
    means = {}
    lowest, seeds = 0.0, 1
    for role, name, values in ((EXTRA, "biased", biased), (ALIGNED, "debiased", debiased)):
        values = np.atleast_2d(np.asarray(values, float))
        if values.shape[1] != len(n):
            raise ValueError(f"{name} has {values.shape[1]} values, n has {len(n)}: one value (a seed) for each n")
        means[name], seeds = values.mean(0), len(values)
        if seeds > 1:
            low, high = np.quantile(values, [0.025, 0.975], axis=0)
            figure.add_trace(band(n, low, high, role))
            lowest = min(lowest, float(low.min()))
        lowest = min(lowest, float(means[name].min()))
        figure.add_scatter(
            x=n,
            y=means[name],
            mode="lines+markers",
            name=name,
            line=role.line(),
            marker=role.marker(8),
            hovertemplate=f"{name}<br>n = %{{x:.0f}}<br>CKA %{{y:.3f}}<extra></extra>",
        )
    if truth is not None:
        name = f"truth ({truth:g})"
        figure.add_scatter(
            x=n[[0, -1]], y=[truth, truth], mode="lines", name=name, line=BASELINE.line(2), hoverinfo="skip"
        )
    ticks = thinned(n, 10)
    figure.update_xaxes(type="log", title="rows n", tickvals=ticks, ticktext=[f"{tick:.0f}" for tick in ticks])
    figure.update_yaxes(range=(min(-0.05, lowest * 1.1), 1.02), title="CKA")
    ends = ", ".join(
        f"{name} {value[0]:.2f} at n = {n[0]:.0f} and {value[-1]:.2f} at n = {n[-1]:.0f}"
        for name, value in means.items()
    )
    spread = f"Band: central 95 % of {seeds} seeds." if seeds > 1 else ""
    return Figure(figure, f"CKA {ends}" + ("." if truth is None else f"; the truth is {truth:g}."), spread)


def rogue_dimensions(shares: Mapping[str, Any], title: str = "Variance carried by the largest dimensions") -> Figure:
    """How much of each layer's variance its ten largest dimensions carry: 1 rogue dimension can decide a similarity.

    Args:
        shares: layer label (T6, S3 …) → each dimension's share of the variance, (d,), in any order; sums to 1.

    Raises:
        ValueError: nothing to draw, or shares that do not sum to 1.
    """
    check_keys(shares, "rogue_dimensions")
    steps = (("largest", 0, 1), ("2nd and 3rd", 1, 3), ("4th to 10th", 3, 10))
    colors = ("#7A2A6C", EXTRA.color, "#C77DB5")  # shades of one hue, apart from the models' two
    ordered = {}
    for label, values in shares.items():
        ordered[label] = np.sort(np.asarray(values, float))[::-1]
        if not abs(ordered[label].sum() - 1) <= 1e-3:  # NaN, too
            raise ValueError(f"shares of {label} sum to {ordered[label].sum():.3f}; variance shares sum to 1")
    figure = canvas(title, margin={"t": 96}, barmode="stack", bargap=0.3)
    for (name, first, last), color, shape in zip(steps, colors, ("", "/", "."), strict=True):
        heights = [100 * float(values[first:last].sum()) for values in ordered.values()]
        figure.add_bar(
            x=list(ordered),
            y=heights,
            name=name,
            marker={"color": color, "pattern": pattern(shape, color), "line": {"width": 0}},
            hovertemplate=f"%{{x}}, {name}: %{{y:.1f}} % of the variance<extra></extra>",
        )
    figure.update_xaxes(title="layer", type="category", showgrid=False)
    top = max(100 * float(values[:10].sum()) for values in ordered.values())
    figure.update_yaxes(range=(0, min(100.0, 1.1 * top)), title="share of variance (%)")
    worst = max(ordered, key=lambda label: ordered[label][0])
    d = len(ordered[worst])
    summary = (
        f"In {worst} one dimension of {d} carries {100 * ordered[worst][0]:.1f} % of the variance and ten carry "
        f"{100 * ordered[worst][:10].sum():.1f} %; even shares would be {100 / d:.1f} % each."
    )
    return Figure(figure, summary, "The ten largest of each layer; the others carry what is missing to 100 %.")
