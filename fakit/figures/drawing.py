"""Pieces that several figures share: the canvas, panels, color bars, hatching, outlines and bands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from fakit.figures.theme import LINES, SMALL, TEMPLATE, TEXT, Role
from fakit.figures.ticks import logarithmic

MARGIN = {"l": 70, "r": 24, "t": 76, "b": 56}
HATCH_INK = "#9A9A9A"  # on the dark end of every scale, and on both pages


def canvas(title: str, size: tuple[int, int] = LINES, margin: dict | None = None, **layout: Any) -> go.Figure:
    """An empty figure in the kit's template: title (short, plain text), size (width, height) and margins in px."""
    width, height = size
    figure = go.Figure(layout={"template": TEMPLATE, "width": width, "height": height, "title": {"text": title}})
    return figure.update_layout(margin=MARGIN | (margin or {})).update_layout(layout)


def label_width(labels: Iterable[str]) -> int:
    """Pixels that the longest of `labels` takes at the size of tick labels, with a little air."""
    return round(7.6 * max((len(part) for label in labels for part in str(label).split("<br>")), default=0)) + 8


def panels(count: int, gap: float = 0.08) -> list[tuple[float, float]]:
    """`count` domains of equal width side by side in 0…1, `gap` of the whole between them."""
    width = (1 - gap * (count - 1)) / count
    return [(i * (width + gap), i * (width + gap) + width) for i in range(count)]


def axis_id(letter: str, number: int) -> str:
    """plotly's name of the `number`-th axis, counted from 0: `x`, `x2`, `x3` …"""
    return letter if number == 0 else f"{letter}{number + 1}"


def axis_key(letter: str, number: int) -> str:
    """plotly's layout key of the `number`-th axis: `xaxis`, `xaxis2` …"""
    return f"{letter}axis" if number == 0 else f"{letter}axis{number + 1}"


def panel_title(figure: go.Figure, number: int, text: str) -> None:
    """A heading above panel `number`."""
    figure.add_annotation(
        text=text,
        x=0,
        xref=f"{axis_id('x', number)} domain",
        xanchor="left",
        y=1,
        yref=f"{axis_id('y', number)} domain",
        yanchor="bottom",
        yshift=4,
        showarrow=False,
        font={"size": SMALL + 1, "color": TEXT},
    )


def note(figure: go.Figure, text: str, x: float, y: float, **extra: Any) -> None:
    """A piece of text at data coordinates (override `xref`, `yref`, `font` … by keyword)."""
    figure.add_annotation(
        **{"text": text, "x": x, "y": y, "showarrow": False, "font": {"size": SMALL, "color": TEXT}, **extra}
    )


def color_bar(
    title: str, across: bool = False, x: float = 1.02, y: float = 0.5, length: float = 1.0, **extra: Any
) -> dict:
    """plotly `colorbar` attributes that the static twin places identically; x, y in paper coordinates."""
    return {
        "title": {"text": title, "side": "bottom" if across else "right", "font": {"color": TEXT, "size": SMALL}},
        "orientation": "h" if across else "v",
        "x": x,
        "xanchor": "center" if across else "left",
        "y": y,
        "yanchor": "top" if across else "middle",
        "len": length,
        "thickness": 14,
        "xpad": 0,
        "ypad": 0,
        "outlinewidth": 0,
        "ticks": "outside",
        "tickcolor": TEXT,
        "tickfont": {"size": SMALL, "color": TEXT},
        **extra,
    }


def heat_axes(
    figure: go.Figure, rows: Sequence[str], columns: Sequence[str], number: int = 0, down: bool = False
) -> None:
    """Numeric axes with one tick a cell (thinned where labels would touch); `down` puts row 0 on top."""
    layout = figure.layout
    x_low, x_high = layout[axis_key("x", number)].domain or (0, 1)
    room_x = (layout.width - layout.margin.l - layout.margin.r) * (x_high - x_low) / max(len(columns), 1)
    room_y = (layout.height - layout.margin.t - layout.margin.b) / max(len(rows), 1)
    turn = room_x < label_width(columns) and max(map(len, columns), default=0) > 4
    step_x = 1 if room_x >= 17 and turn else int(np.ceil((17 if turn else label_width(columns)) / room_x))
    step_y = int(np.ceil(16 / room_y))
    edge = (len(rows) - 0.5, -0.5) if down else (-0.5, len(rows) - 0.5)
    common = {"showgrid": False, "zeroline": False, "ticklen": 3}
    x_ticks, y_ticks = list(range(0, len(columns), step_x)), list(range(0, len(rows), step_y))
    x_axis = {"range": (-0.5, len(columns) - 0.5), "tickvals": x_ticks, "ticktext": [columns[i] for i in x_ticks]}
    y_axis = {"range": edge, "tickvals": y_ticks, "ticktext": [rows[i] for i in y_ticks]}
    figure.update_layout(
        {
            axis_key("x", number): {**common, **x_axis, "tickangle": -90 if turn else 0},
            axis_key("y", number): {**common, **y_axis},
        }
    )


def hatch(cells: np.ndarray, number: int = 0, name: str = "") -> go.Scatter | None:
    """Diagonal strokes over the True cells of (rows, columns), about 24 across; None where there are no such cells.

    Strokes are merged along each diagonal, so that half a 128 × 128 map costs some 24 lines and not 8,000.
    """
    cells = np.asarray(cells, bool)
    if not cells.any():
        return None
    across = max(cells.shape)
    fine, every = max(1, round(24 / across)), max(1, round(across / 24))  # strokes a cell, or cells a stroke
    fine_cells = np.kron(cells, np.ones((fine, fine), bool))
    rows, columns = fine_cells.shape
    flipped = fine_cells[:, ::-1]  # diagonals of the flipped matrix are the anti-diagonals
    x: list[float | None] = []
    y: list[float | None] = []
    for offset in range(-rows + 1, columns):
        if offset % every:
            continue
        run = np.diagonal(flipped, offset).astype(int)
        change = np.flatnonzero(np.diff(np.concatenate([[0], run, [0]])))
        row0, column0 = max(0, -offset), columns - max(0, offset)
        for first, last in zip(change[::2], change[1::2], strict=True):
            x += [(column0 - first) / fine - 0.5, (column0 - last) / fine - 0.5, None]
            y += [(row0 + first) / fine - 0.5, (row0 + last) / fine - 0.5, None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": HATCH_INK, "width": 1},
        hoverinfo="skip",
        name=name,
        showlegend=bool(name),
        xaxis=axis_id("x", number),
        yaxis=axis_id("y", number),
    )


def outline(figure: go.Figure, row: float, column: float, number: int = 0) -> None:
    """A frame around one cell that shows on dark and on light cells: black outside, white inside."""
    for inset, color, width in ((0.06, "#000000", 4.5), (0.06, "#FFFFFF", 2)):  # inside: a plot clips at its edge
        figure.add_shape(
            type="rect",
            x0=column - 0.5 + inset,
            x1=column + 0.5 - inset,
            y0=row - 0.5 + inset,
            y1=row + 0.5 - inset,
            xref=axis_id("x", number),
            yref=axis_id("y", number),
            line={"color": color, "width": width},
        )


def band(x: Any, low: Any, high: Any, role: Role, number: int = 0, name: str = "") -> go.Scatter:
    """A filled band between `low` and `high` (same length as `x`), in the role's tint."""
    x, low, high = (np.asarray(part, float) for part in (x, low, high))
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=role.tint(0.2),
        hoverinfo="skip",
        name=name,
        showlegend=bool(name),
        xaxis=axis_id("x", number),
        yaxis=axis_id("y", number),
    )


def log_axis(values: Iterable[float], air: float = 0.08) -> dict:
    """plotly axis attributes for a logarithmic axis around the positive `values`: range and plain-number ticks."""
    kept = [value for value in values if np.isfinite(value) and value > 0]
    low, high = (np.log10(edge(kept)) if kept else default for edge, default in ((min, -1.0), (max, 1.0)))
    pad = max(0.1, air * (high - low))
    ticks = logarithmic(10 ** (low - pad), 10 ** (high + pad))
    labels = [f"{tick:g}" for tick in ticks]
    return {"type": "log", "range": (low - pad, high + pad), "tickvals": ticks, "ticktext": labels}


def records(table: Any, required: Sequence[str], what: str) -> list[dict]:
    """Rows as dicts from a DataFrame or an iterable of mappings; ValueError names the missing columns.

    Raises:
        ValueError: no rows, or a row without one of the `required` columns.
    """
    rows = table.to_dict("records") if hasattr(table, "to_dict") else [dict(row) for row in table]
    if not rows:
        raise ValueError(f"{what} needs at least one row with {', '.join(required)}; found an empty table")
    for row in rows:
        if missing := [name for name in required if name not in row]:
            raise ValueError(
                f"{what} needs columns {', '.join(required)}; missing {', '.join(missing)} in {', '.join(row)}"
            )
    return rows


def distinct(values: Iterable[Any]) -> list[Any]:
    """Values in order of appearance, each once."""
    return list(dict.fromkeys(values))


def matrix(values: Any, what: str) -> np.ndarray:
    """A float matrix (rows, columns).

    Raises:
        ValueError: not two-dimensional, or empty.
    """
    made = np.asarray(values, float)
    if made.ndim != 2 or made.size == 0:
        raise ValueError(f"{what} is a matrix (rows, columns); found shape {made.shape}")
    return made


def names(given: Sequence[str] | None, count: int, letter: str, what: str) -> list[str]:
    """`given`, or T0, T1 … / S0, S1 …; ValueError where the number of labels is not `count`."""
    made = [f"{letter}{i}" for i in range(count)] if given is None else [str(label) for label in given]
    if len(made) != count:
        raise ValueError(f"{what}: {count} layers in the matrix, {len(made)} labels {made}: give one label a layer")
    return made


def interval(mean: Any, low: Any, high: Any, color: str = TEXT, width: float = 1.8) -> dict:
    """plotly error-bar attributes for an interval [low, high] around mean."""
    mean, low, high = (np.asarray(part, float) for part in (mean, low, high))
    return {
        "type": "data",
        "array": high - mean,
        "arrayminus": mean - low,
        "color": color,
        "thickness": width,
        "width": 5,
    }


def check_keys(found: Mapping, what: str) -> None:
    """ValueError for an empty mapping."""
    if not found:
        raise ValueError(f"{what}: nothing to draw, the mapping is empty")
