"""Attention: teacher, student and difference; which head resembles which; rollout and attribution to the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from fakit.figures.drawing import (
    axis_id,
    axis_key,
    canvas,
    check_keys,
    color_bar,
    hatch,
    heat_axes,
    label_width,
    matrix,
    outline,
    panel_title,
    panels,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import DIFFERENCE, DISTANCE, HEATMAP, STUDENT, TEACHER, WIDE, model_role, ramp

LONGEST = 14  # characters of a token label
ROW = 16  # px that a row needs for its name
COLUMN = 13  # px that a column needs for its name, turned
TALLEST = 40 * ROW  # longer sequences name every second row, and so on


def _short(token: str) -> str:
    token = str(token).replace("\n", "⏎").replace("<", "&lt;")
    return token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"


def _name_tokens(figure: go.Figure, labels: Sequence[str], number: int, width: float) -> None:
    """Every column's name where its room allows upright text; where names are thinned, line breaks keep theirs."""
    if COLUMN * len(labels) <= width:
        every = {"tickvals": list(range(len(labels))), "ticktext": list(labels), "tickangle": -90}
        figure.update_layout({axis_key("x", number): every})
    breaks = [i for i, label in enumerate(labels) if label == "⏎"]
    for key in (axis_key("x", number), axis_key("y", number)):
        ticks = list(figure.layout[key].tickvals)
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
        kept = {i for i in ticks if all(abs(i - at) >= step for at in breaks)} | set(breaks)
        figure.update_layout({key: {"tickvals": sorted(kept), "ticktext": [labels[i] for i in sorted(kept)]}})


def _hover(labels: Sequence[str], head: str, values: np.ndarray) -> dict:
    """plotly attributes: each cell's two tokens and value; in a long map positions alone, which cost no text a cell."""
    if len(labels) > 48:
        return {"hovertemplate": f"query %{{y}}, key %{{x}}<br>{head}: %{{z:.3f}}<extra></extra>"}

    def cell(query: str, key: str, value: float) -> str:
        return f"{query} → {key}<br>{head}: " + (f"{value:.3f}" if np.isfinite(value) else "masked")

    rows = zip(labels, values, strict=True)
    text = [[cell(query, key, value) for key, value in zip(labels, row, strict=True)] for query, row in rows]
    return {"hovertext": text, "hoverinfo": "text"}


def attention_pair(
    teacher_map: Any,
    student_map: Any,
    tokens: Sequence[str],
    mask: Any = None,
    title: str = "Attention of teacher and student",
    teacher_name: str = "teacher",
    student_name: str = "student",
) -> Figure:
    """Teacher, student and their difference (student − teacher), one cell a pair of query (row) and key (column).

    Args:
        teacher_map: (T, T), rows sum to 1 over the keys that count.
        student_map: (T, T); None shows the teacher alone.
        tokens: T strings.
        mask: what counts: bool (T,) (True = a token, not padding) or bool (T, T) (True = the query may see the key, as
            under a causal mask). Cells that do not count are hatched, not zero.
        title: short title.
        teacher_name: heading of the first panel, e.g. "teacher, T6 head 3".
        student_name: heading of the second.

    Raises:
        ValueError: maps of different shapes, or tokens or mask that do not fit them.
    """
    alone = student_map is None
    teacher = matrix(teacher_map, "teacher_map")
    student = teacher if alone else matrix(student_map, "student_map")
    length = len(tokens)
    if teacher.shape != (length, length) or student.shape != (length, length):
        raise ValueError(
            f"{length} tokens need maps ({length}, {length}); found teacher {teacher.shape}, student {student.shape}: "
            "pass one head of one sequence, or a mean over heads"
        )
    counts = np.ones((length, length), bool) if mask is None else np.asarray(mask, bool)
    if counts.shape == (length,):
        counts = counts[:, None] & counts[None, :]
    if counts.shape != (length, length):
        raise ValueError(f"mask has shape {counts.shape}; {length} tokens need ({length},) or ({length}, {length})")
    if not counts.any():
        raise ValueError("no pair of tokens counts under this mask: there is nothing to draw")
    labels = [_short(token) for token in tokens]
    side, below = label_width(labels) + 24, label_width(labels) + 74
    width = side + 16 + 280 if alone else WIDE
    plot_height = max(258, min(ROW * length, TALLEST))
    figure = canvas(title, (width, 72 + plot_height + below), {"l": side, "r": 16, "t": 72, "b": below})
    drawn = [np.where(counts, values, np.nan) for values in (teacher, student, student - teacher)]
    top = max(float(np.nanmax(drawn[0])), float(np.nanmax(drawn[1])), 1e-6)
    reach = max(float(np.nanmax(np.abs(drawn[2]))), 1e-6)
    heads = (teacher_name, student_name, "student − teacher")
    styles = ((ramp(TEACHER), 0.0, top), (ramp(STUDENT), 0.0, top), (DIFFERENCE, -reach, reach))
    domains = panels(1) if alone else panels(3, 0.035)
    for number, (values, head, (scale, low, high), domain) in enumerate(
        zip(drawn, heads, styles, domains, strict=False)  # alone: the first of the three
    ):
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": axis_id("y", number),
                    "matches": None if number == 0 else "x",
                },
                axis_key("y", number): {"anchor": axis_id("x", number), "matches": None if number == 0 else "y"},
            }
        )
        ticks = [low, (low + high) / 2, high]
        bar = color_bar(
            "attention" if number < 2 else "difference",
            across=True,
            x=sum(domain) / 2,
            y=-(label_width(labels) + 12) / plot_height,
            length=(domain[1] - domain[0]) * 0.9,
            tickvals=ticks,
            ticktext=[f"{tick:+.2f}" if number == 2 and tick else f"{tick:.2f}" for tick in ticks],
        )
        figure.add_heatmap(
            z=values.astype(np.float32),
            zmin=low,
            zmax=high,
            colorscale=scale,
            colorbar=bar,
            xaxis=axis_id("x", number),
            yaxis=axis_id("y", number),
            **_hover(labels, head, values),
        )
        heat_axes(figure, labels, labels, number, down=True)
        _name_tokens(figure, labels, number, (width - side - 16) * (domain[1] - domain[0]))
        if number:
            figure.update_layout({axis_key("y", number): {"showticklabels": False}})
        if strokes := hatch(~counts, number):
            figure.add_trace(strokes)
        panel_title(figure, number, head)
    hidden = "Hatched: masked, takes no part. " if not counts.all() else ""
    if alone:
        q, k = np.unravel_index(np.nanargmax(drawn[0]), (length, length))
        summary = f"{teacher_name}: most attention at {tokens[q]} → {tokens[k]} ({teacher[q, k]:.2f})."
        return Figure(figure, summary, f"Rows are queries, columns keys. {hidden}".strip())
    gap = np.nanargmax(np.abs(drawn[2]))
    q, k = np.unravel_index(gap, (length, length))
    total = 0.5 * np.nansum(np.abs(drawn[2]), axis=1)[counts.any(1)].mean()
    summary = (
        f"Teacher and student maps differ by a total variation of {total:.2f} a row on average; most at {tokens[q]} → "
        f"{tokens[k]} (teacher {teacher[q, k]:.2f}, student {student[q, k]:.2f})."
    )
    return Figure(
        figure, summary, f"Rows are queries, columns keys. {hidden}Teacher and student share one scale, 0 to {top:.2f}."
    )


def head_matching(
    distances: Any,
    assignment: Sequence[tuple[int, int]] | None = None,
    title: str = "Distance between heads (Jensen–Shannon)",
) -> Figure:
    """Student heads (rows) against teacher heads (columns): bright = alike; a dot marks each row's nearest,
    a frame the chosen match.

    Args:
        distances: (H_S, H_T) Jensen–Shannon distances in [0, 1] (square root of the divergence in bits).
        assignment: (student head, teacher head) pairs, e.g. of the Hungarian method.
        title: short title.

    Raises:
        ValueError: not a matrix, or values outside [0, 1].
    """
    values = matrix(distances, "head distances")
    if np.nanmin(values) < -1e-6 or np.nanmax(values) > 1 + 1e-6:
        raise ValueError(
            f"Jensen–Shannon distances lie in [0, 1]; found {np.nanmin(values):.3f} to {np.nanmax(values):.3f}"
        )
    rows, columns = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("st", values.shape, strict=True))
    figure = canvas(title, HEATMAP, {"l": 66, "r": 92, "t": 64, "b": 56})
    roomy = (HEATMAP[0] - 158) / len(columns) >= 34
    figure.add_heatmap(
        z=values,
        zmin=0,
        zmax=1,
        colorscale=DISTANCE,
        colorbar=color_bar("distance"),
        text=[[f"{v:.2f}" for v in row] for row in values] if roomy else None,
        texttemplate="%{text}" if roomy else None,
        hovertemplate="student head %{y}, teacher head %{x}<br>distance %{z:.3f}<extra></extra>",
    )
    heat_axes(figure, [r[1:] for r in rows], [c[1:] for c in columns])
    figure.update_xaxes(title="teacher head").update_yaxes(title="student head")
    rows_with = np.flatnonzero(np.isfinite(values).any(1))
    nearest = {int(row): int(np.nanargmin(values[row])) for row in rows_with}
    figure.add_scatter(
        x=[column - 0.3 for column in nearest.values()],  # in the cell's corner, beside the number
        y=[row + 0.3 for row in nearest],
        mode="markers",
        marker={"symbol": "circle", "size": 7, "color": "#FFFFFF", "line": {"color": "#000000", "width": 1.5}},
        hoverinfo="skip",
        showlegend=False,
    )
    for row, column in assignment or ():
        outline(figure, row, column)
    summary = (
        f"Distances between {len(rows)} student and {len(columns)} teacher heads: median {np.nanmedian(values):.2f}"
    )
    if assignment:
        matched = [values[row, column] for row, column in assignment]
        summary += f", matched heads {np.mean(matched):.2f} on average"
    if len(rows) == len(columns):
        own = sum(row == column for row, column in nearest.items())
        summary += f"; {own} of {len(rows)} student heads are nearest to the teacher head of their own number"
    framed = "; framed: the one-to-one matching" if assignment else ""
    return Figure(figure, summary + ".", f"Dot: the teacher head nearest to the student head of this row{framed}.")


def rollout(
    teacher: Any,
    student: Any,
    tokens: Sequence[str],
    title: str = "Attention rollout to the input tokens",
) -> Figure:
    """How much of one position's attention reaches each input token, through all layers, in both models.

    Args:
        teacher: (T,) shares that sum to 1.
        student: (T,), or None.
        tokens: T strings.
        title: short title.

    Raises:
        ValueError: a length that is not T.
    """
    figure, drawn = _token_bars(teacher, student, tokens, title, "rollout")
    figure.update_yaxes(rangemode="tozero", title="share of attention")
    tops = [f"the {name} looks most at {tokens[int(v.argmax())]} ({v.max():.2f})" for name, v in drawn.items()]
    sentence = ", ".join(tops)
    return Figure(figure, f"{sentence[0].upper()}{sentence[1:]}, of {len(tokens)} tokens.")


def token_attributions(
    teacher: Any,
    student: Any,
    tokens: Sequence[str],
    title: str = "Which tokens speak for the answer?",
) -> Figure:
    """One attribution a token in both models, up for the answer, down against it, each as a share of its model's total.

    Scores of two models have different units (their logits' scales); what is drawn is score / Σ |score|.

    Args:
        teacher: (T,) scores.
        student: (T,), or None.
        tokens: T strings.
        title: short title.

    Raises:
        ValueError: a length that is not T, or scores that are all 0.
    """
    shares = []
    for name, values in (("teacher", teacher), ("student", student)):
        values = None if values is None else np.asarray(values, float)
        if values is not None and not np.abs(values).sum() > 0:
            raise ValueError(f"the {name}'s attributions are all 0 (or not finite): no token can be said to matter")
        shares.append(None if values is None else values / np.abs(values).sum())
    figure, drawn = _token_bars(*shares, tokens, title, "attribution")
    figure.update_yaxes(title="share of attribution", zeroline=True)
    tops = [
        f"for the {name} {tokens[int(abs(v).argmax())]} weighs most ({v[abs(v).argmax()]:+.2f})"
        for name, v in drawn.items()
    ]
    sentence = ", ".join(tops)
    return Figure(figure, f"{sentence[0].upper()}{sentence[1:]}, of {len(tokens)} tokens.")


def head_profiles(
    heads: Mapping[str, tuple[Any, Any]],
    x_label: str = "normalized entropy (1 = looks everywhere)",
    y_label: str = "share on sinks",
    title: str = "One point a head",
) -> Figure:
    """Two properties of every head, both from 0 to 1: teacher's heads as circles, student's as diamonds.

    Args:
        heads: layer name (T6, S3 …) → (x (H,), y (H,)), by head number.
        x_label: axis title.
        y_label: axis title.
        title: short title.

    Raises:
        ValueError: nothing to draw, or x and y of different lengths.
    """
    check_keys(heads, "head_profiles")
    figure = canvas(title, (720, 440))
    points: dict[str, list[tuple[float, float, str]]] = {}
    for label, (x, y) in heads.items():
        x, y = np.asarray(x, float), np.asarray(y, float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"{label} has x of shape {x.shape} and y of shape {y.shape}: give one number a head each")
        role = model_role(label)
        points.setdefault(role.name, []).extend(
            (a, b, f"{label}, head {i}") for i, (a, b) in enumerate(zip(x, y, strict=True))
        )
    roles = {role.name: role for role in map(model_role, heads)}
    parts = []
    for name, found in points.items():
        x, y, labels = zip(*found, strict=True)
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            name=name,
            marker=roles[name].marker(9, opacity=0.75),
            customdata=labels,
            hovertemplate="%{customdata}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
        )
        parts.append(f"the {name}'s {len(found)} heads {np.mean(x):.2f} and {np.mean(y):.2f}")
    figure.update_xaxes(range=(-0.03, 1.03), title=x_label).update_yaxes(range=(-0.03, 1.03), title=y_label)
    return Figure(figure, f"Means of {x_label} and {y_label}: {', '.join(parts)}.")


def _token_bars(teacher: Any, student: Any, tokens: Sequence[str], title: str, what: str):
    """Bars by token for both models: the figure, and {"teacher": (T,), "student": (T,)} as drawn."""
    labels = [_short(token) for token in tokens]
    below = label_width(labels) + 20
    figure = canvas(title, (WIDE if len(labels) > 16 else 720, 320 + below), {"b": below}, barmode="group", bargap=0.25)
    drawn = {}
    for role, values in ((TEACHER, teacher), (STUDENT, student)):
        if values is None:
            continue
        values = np.asarray(values, float)
        if values.shape != (len(labels),):
            raise ValueError(
                f"the {role.name}'s {what} has shape {values.shape}; {len(labels)} tokens need ({len(labels)},)"
            )
        figure.add_bar(
            x=np.arange(len(labels)),
            y=values,
            name=role.name,
            marker=role.bar(),
            customdata=labels,
            hovertemplate=f"{role.name}, %{{customdata}}: %{{y:.3f}}<extra></extra>",
        )
        drawn[role.name] = values
    figure.update_xaxes(
        tickvals=np.arange(len(labels)), ticktext=labels, tickangle=-90, range=(-0.6, len(labels) - 0.4), showgrid=False
    )
    return figure, drawn
