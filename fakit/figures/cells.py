"""Where a term pays: its gain in every cell of a crossed study, at one look."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fakit.figures.drawing import axis_id, axis_key, canvas, distinct, interval, note, panels, records
from fakit.figures.figure import Figure
from fakit.figures.theme import SMALL, TEXT, WIDE, arm

COLUMNS = ("task", "cell", "arm", "n", "gain", "gain_low", "gain_high", "verdict")
MOST = 3  # factors beside the compared one: columns of panels, places in a panel, rows of panels


def gain_by_cell(table: Any, against: str, unit: str = "", title: str | None = None) -> Figure:
    """One panel for each level of the first factor (columns) and of the third (rows); in a panel, the second from left
    to right: the paired gain over `against`, with its 95 % interval. Filled: sure after the correction; open: not.

    Args:
        table: rows of one task, as `fakit.experiments.cells.gains_in_cells` gives them, in the unit to be drawn.
        against: the level that gains are over, for the axis.
        unit: of the gain, for the axis.
        title: short title.

    Raises:
        ValueError: an empty table, missing columns, several tasks, or cells of no or more than three factors.
    """
    rows = records(table, COLUMNS, "gain_by_cell")
    tasks = distinct(row["task"] for row in rows)
    if len(tasks) > 1:
        raise ValueError(f"gain_by_cell: found the tasks {', '.join(tasks)}; draw them one by one.")
    if not 1 <= (factors := len(rows[0]["cell"])) <= MOST:
        raise ValueError(f"gain_by_cell: cells of {factors} factors were to be drawn; there is room for 1 to {MOST}.")
    # one factor: places in one panel; two: columns and places
    padded = [("",) * (factors == 1) + tuple(row["cell"]) + ("",) * (factors < MOST) for row in rows]
    columns, places, bands = (distinct(cell[i] for cell in padded) for i in range(MOST))
    arms = distinct(row["arm"] for row in rows)
    ends = [end for row in rows for end in (row["gain_low"], row["gain_high"]) if end == end]
    ends = [*(ends or [row["gain"] for row in rows]), 0.0]
    air = 0.06 * ((max(ends) - min(ends)) or 1)
    figure = canvas(title or f"{tasks[0]}: gain over ‘{against}’", (WIDE, 150 + 210 * len(bands)), {"l": 84, "t": 112})
    area = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.update_layout(legend={"y": 1 + 26 / area, "yanchor": "bottom"})  # above the headings of the columns
    across, down = panels(len(columns), 0.025), panels(len(bands), 0.14 if len(bands) > 1 else 0.0)[::-1]
    shown: set[str] = set()
    for number, (column, of_band) in enumerate((c, b) for b in bands for c in columns):
        x, y = axis_id("x", number), axis_id("y", number)
        left, bottom = column == columns[0], of_band == bands[-1]
        mine = [
            (cell[1], row) for cell, row in zip(padded, rows, strict=True) if (cell[0], cell[2]) == (column, of_band)
        ]
        for position, name in enumerate(arms):
            points = [(places.index(place), row) for place, row in mine if row["arm"] == name]
            if not points:
                continue
            own = name.removeprefix(f"{against} + ")  # what it adds
            role, off = arm(own, position), 0.2 * (position - (len(arms) - 1) / 2)
            parts = [[row[key] for _, row in points] for key in ("gain", "gain_low", "gain_high")]
            sure = [row["verdict"] != "not sure" for _, row in points]
            figure.add_scatter(
                x=[place + off for place, _ in points],
                y=parts[0],
                mode="markers",
                marker=role.marker(
                    9,
                    symbol=[f"{role.symbol}{'' if s else '-open'}" for s in sure],
                    line={"width": 1.6, "color": role.color},
                ),
                error_y=interval(*parts, role.color, 1.6),
                name=name if own == name else f"+ {own}",
                legendgroup=name,
                showlegend=name not in shown,
                customdata=[[row["gain_low"], row["gain_high"], row["n"], row["verdict"]] for _, row in points],
                hovertemplate=(
                    f"{name}, {', '.join(part for part in (column, of_band) if part)}<br>%{{y:+.3g}} (95 % interval "
                    "%{customdata[0]:+.3g} to %{customdata[1]:+.3g}), %{customdata[2]} pairs: %{customdata[3]}"
                    "<extra></extra>"
                ),
                xaxis=x,
                yaxis=y,
            )
            shown.add(name)
        if not mine:
            note(figure, "not run", 0.5, 0.5, xref=f"{x} domain", yref=f"{y} domain")
        figure.add_shape(
            **{"type": "line", "x0": 0, "x1": 1, "xref": f"{x} domain", "y0": 0, "y1": 0, "yref": y, "layer": "below"},
            line={"color": TEXT, "width": 1.5, "dash": "dot"},
        )
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": across[columns.index(column)],
                    "anchor": y,
                    "tickvals": list(range(len(places))),
                    "ticktext": places,
                    "range": (-0.6, len(places) - 0.4),
                    "showgrid": False,
                    "showticklabels": bottom,
                },
                axis_key("y", number): {
                    "domain": down[bands.index(of_band)],
                    "anchor": x,
                    "range": (min(ends) - air, max(ends) + air),
                    "zeroline": False,
                    "showticklabels": left,
                    "nticks": 6,
                    "title": {"text": f"{of_band}<br>gain{f' ({unit})' if unit else ''}".removeprefix("<br>")}
                    if left
                    else None,
                },
            }
        )
        if of_band == bands[0] and column:
            heading = {"xanchor": "left", "yanchor": "bottom", "yshift": 4, "font": {"size": SMALL + 1, "color": TEXT}}
            note(figure, column, 0, 1, xref=f"{x} domain", yref=f"{y} domain", **heading)
    found = Counter((row["arm"], row["verdict"]) for row in rows)
    of_all = Counter(row["arm"] for row in rows)
    said = "; ".join(
        f"{name}: {found[name, 'gain']} gains, {found[name, 'loss']} losses, {found[name, 'not sure']} not sure "
        f"of {of_all[name]} cells"
        for name in arms
    )
    pairs = distinct(sorted(row["n"] for row in rows))
    counted = f"{pairs[0]}–{pairs[-1]}" if len(pairs) > 1 else str(pairs[0])
    caption = (
        f"Above the dotted line is better than {against}. Bars: 95 % intervals of {counted} pairs, not corrected. "
        "Filled: sure after Benjamini and Hochberg's correction for all comparisons of the task; open: not sure."
    )
    return Figure(figure, f"Gain over {against} on {tasks[0]}. {said}.", caption)
