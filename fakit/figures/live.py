"""The picture of a run while it trains: loss by term, CKA to the teacher over steps, and its matrix now, as one SVG.

It is drawn by `chart.py`, and so made anew for every step without a flicker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from fakit.figures.chart import DASHES, Axis, Chart, text
from fakit.figures.theme import EXTRA, FONT, FONT_SIZE, ROLES, SIMILARITY, SMALL, TEXT, Role
from fakit.figures.ticks import enclosing, linear, logarithmic
from fakit.figures.training import term_style

WIDTH, HEIGHT = 840, 340  # px: as wide as a notebook's cell beside the open side bar
POINTS = 240  # drawn of a line; more would not be seen
_TOP, _BOTTOM = 62, 48  # px above and below the axes


def training_now(
    history: Sequence[Mapping[str, Any]],
    terms: Sequence[str],
    similarity: Mapping[int, Any],
    pairs: Sequence[tuple[int, int]] = (),
    events: Sequence[Mapping[str, Any]] = (),
    steps: int = 0,
    weighted: bool = False,
) -> tuple[str, str]:
    """A run as it stands.

    Args:
        history: rows with `step` and a column a term; a row may lack a term.
        terms: the terms to draw.
        similarity: step → (S + 1, T + 1) CKA, rows and columns by layer number.
        pairs: (student layer, teacher layer), the mapped ones: a line each, and framed in the matrix.
        events: {step, name, old, new}: dotted lines.
        steps: right end of the axes, steps in all; 0 where that is not known yet.
        weighted: what the columns are; it names the axis.

    Returns:
        (SVG document of 840 × 340 px, one sentence that says what it shows).
    """
    lines = {name: _points(history, name) for name in terms}
    found = {name: points for name, points in lines.items() if points}
    name = "weighted loss" if weighted else "loss before weighting"
    wide = WIDTH if not similarity else 384
    parts = [
        _chart(
            found,
            {name: term_style(name, i) for i, name in enumerate(terms)},
            (0, wide),
            "Loss by term",
            name,
            steps,
            events,
            log=True,
        )
    ]
    looks = {}
    if similarity:
        shape = np.shape(next(iter(similarity.values())))
        pairs = [(s, t) for s, t in pairs if s < shape[0] and t < shape[1]]
        looks = {
            f"S{s}·T{t}": [
                (step, float(values[s][t])) for step, values in similarity.items() if np.isfinite(values[s][t])
            ]
            for s, t in pairs
        }
        styles = {name: ROLES[i % len(ROLES)] for i, name in enumerate(looks)}
        parts.append(_chart(looks, styles, (384, 224), "CKA, mapped pairs", "", steps, events=(), log=False))
        last = max(similarity)
        parts.append(_matrix(np.asarray(similarity[last], float), pairs, (608, 232), f"CKA at step {last}"))
    summary = _summary(found, looks, events, steps)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" font-family="{escape(FONT)}" font-size="{SMALL}" fill="{TEXT}" style="max-width:100%;height:auto">'
        f"<title>Training now</title><desc>{escape(summary)}</desc>{''.join(parts)}</svg>"
    ), summary


Points = list[tuple[float, float]]


def _points(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(step, value) of one term, above 0 and finite; thinned, the last one kept."""
    found = [(row["step"], row[name]) for row in history if name in row and 0 < row[name] < math.inf]
    stride = -(-len(found) // POINTS) or 1
    return found[::-1][::stride][::-1]


def _chart(
    lines: Mapping[str, Points],
    styles: Mapping[str, Role],
    place: tuple[float, float],
    title: str,
    axis: str,
    steps: int,
    events: Sequence[Mapping[str, Any]],
    log: bool,
) -> str:
    """Lines over steps, each named at its end."""
    start, width = place
    values = [value for points in lines.values() for _, value in points]
    low, high = enclosing(min(values, default=0.1), max(values, default=1.0)) if log else (0.0, 1.0)
    ticks = logarithmic(low, high) if log else (0.0, 0.25, 0.5, 0.75, 1.0)
    steps = _end(steps, max((step for points in lines.values() for step, _ in points), default=0))
    marks = linear(0, steps, 5 if width > 300 else 3, whole=True)
    left, right, top, bottom = start + 62, start + width - 86, _TOP, HEIGHT - _BOTTOM
    chart = Chart(Axis(0, steps, marks), Axis(low, high, ticks, log), left, right, top, bottom)
    parts = [text(start + 12, 22, title, FONT_SIZE + 2)]
    if axis:
        parts.append(text(start + 12, 42, f"{axis}, logarithmic axis"))
    parts.append(chart.frame("step"))
    heights: dict[float, int] = {}
    for event in _net(events):
        at, _ = chart.at(event["step"], low)
        row = heights[event["step"]] = heights.get(event["step"], -1) + 1
        side = ("end", -4) if at > (left + right) / 2 else ("start", 4)
        parts.append(f'<path d="M{at:.1f} {top}V{bottom}" stroke="{TEXT}" stroke-dasharray="2 3" fill="none"/>')
        parts.append(
            text(
                at + side[1],
                top + 11 + 15 * row,
                f"{event['name']} {event['old']:g} → {event['new']:g}",
                anchor=side[0],
            )
        )
    if not values:
        parts.append(text((left + right) / 2, (top + bottom) / 2, "no step yet", anchor="middle"))
    ends = {name: chart.at(*points[-1]) for name, points in lines.items() if points}
    labels = _apart({name: end[1] for name, end in ends.items()}, top, bottom)
    for name, (at, end) in ends.items():
        role = styles.get(name, EXTRA)
        parts.append(
            f'<path d="{chart.path(lines[name])}" data-line="{escape(name)}" data-points="{len(lines[name])}" '
            f'stroke="{role.color}" stroke-width="2" stroke-dasharray="{DASHES[role.dash]}" '
            f'stroke-linejoin="round" fill="none"/>'
            f'<circle cx="{at:.1f}" cy="{end:.1f}" r="3.5" fill="{role.color}"/>'
        )
        parts.append(text(at + 9, labels[name] + 4, name, color=role.color))
    return "".join(parts)


def _matrix(values: np.ndarray, pairs: Sequence[tuple[int, int]], place: tuple[float, float], title: str) -> str:
    """Student layers (rows, S0 at the bottom) against teacher layers: cividis from 0 to 1, mapped pairs framed."""
    start, width = place
    rows, columns = values.shape
    cell = min((width - 34) / columns, (HEIGHT - _TOP - _BOTTOM) / rows, 44)
    left, bottom = start + 30, _TOP + cell * rows
    parts = [text(start, 22, title, FONT_SIZE + 2), text(start, 42, "framed: mapped pairs" if pairs else "")]
    shown = np.nan_to_num(values).clip(0, 1)
    colors = sample_colorscale(SIMILARITY, shown.flatten().tolist())
    for i in range(rows):
        for j in range(columns):
            at, top = left + j * cell, bottom - (i + 1) * cell
            parts.append(
                f'<rect x="{at:.1f}" y="{top:.1f}" width="{cell:.2f}" height="{cell:.2f}" '
                f'fill="{colors[i * columns + j]}">'
                f"<title>S{i} and T{j}: CKA {values[i, j]:.3f}</title></rect>"
            )
            if cell >= 26:  # ".87" takes 19 px: nearer to each other, the numbers of a row run together
                ink = "#111" if shown[i, j] > 0.55 else "#fff"
                parts.append(text(at + cell / 2, top + cell / 2 + 4, _short(values[i, j]), anchor="middle", color=ink))
    every = max(1, math.ceil(20 / cell))  # layers between two names
    parts += [text(left - 6, bottom - (i + 0.5) * cell + 4, f"S{i}", anchor="end") for i in range(0, rows, every)]
    parts += [text(left + (j + 0.5) * cell, bottom + 16, f"T{j}", anchor="middle") for j in range(0, columns, every)]
    for i, j in pairs:
        parts.append(
            f'<rect x="{left + j * cell + 1:.1f}" y="{bottom - (i + 1) * cell + 1:.1f}" width="{cell - 2:.2f}" '
            f'height="{cell - 2:.2f}" fill="none" stroke="#D55E00" stroke-width="2.5"/>'
        )
    return "".join(parts)


def _short(value: float) -> str:
    """ ".87": a cell has no room for the 0; "1" from 0.995 on."""
    return (
        f"{value:.2f}".replace("-0.00", "0.00").replace("1.00", "1").replace("0.", ".", 1)
        if np.isfinite(value)
        else "–"
    )


def _apart(heights: Mapping[str, float], top: float, bottom: float, gap: float = 15) -> dict[str, float]:
    """Heights of labels, at least `gap` apart, as near as may be to where they belong."""
    order = sorted(heights, key=heights.get)
    placed: dict[str, float] = {}
    at = top - gap
    for name in order:
        at = placed[name] = max(heights[name], at + gap)
    over = max(0.0, at - bottom)
    limit = bottom
    for name in reversed(order) if over else ():
        limit = placed[name] = min(placed[name], limit)
        limit -= gap
    return placed


def _end(steps: int, last: float) -> int:
    """Right end of the axis: a round number well ahead of the last step, all of them at most,
    so that a long run is seen early.
    """
    _, ahead = enclosing(1, max(20, 2 * last))
    return int(ahead if steps < 1 else min(ahead, max(steps, last)))


def _net(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Changes of one setting at one step as one: where a hand turned a knob in several goes,
    the first old and the last new value.
    """
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for event in events:
        known = merged.setdefault((event["step"], event["name"]), dict(event))
        known["new"] = event["new"]
    return [event for event in merged.values() if event["new"] != event["old"]]


def _summary(
    terms: Mapping[str, Points], looks: Mapping[str, Points], events: Sequence[Mapping[str, Any]], steps: int
) -> str:
    if not terms:
        return f"0 of {steps} steps done." if steps else "0 steps done."
    last = max(points[-1][0] for points in terms.values())
    sentence = (
        f"Step {last:g}"
        + (f" of {steps}: " if steps else ": ")
        + ", ".join(f"{n} {p[0][1]:.3g} → {p[-1][1]:.3g}" for n, p in terms.items())
    )
    if any(looks.values()):
        sentence += "; CKA " + ", ".join(f"{name} {p[0][1]:.2f} → {p[-1][1]:.2f}" for name, p in looks.items() if p)
    changed = [f"{event['name']} {event['old']:g} → {event['new']:g} at step {event['step']}" for event in _net(events)]
    return sentence + (f"; changed: {', '.join(changed)}" if changed else "") + "."
