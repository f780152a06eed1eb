"""The survey's map: which methods align what, and by which loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from fakit.figures.drawing import canvas, note
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, GRID, SMALL, STUDENT, TEACHER, TEXT, Role

ROW = 26  # px
MARGIN = {"l": 156, "r": 6, "t": 96, "b": 16}
# how the places of one kind look: states, attention, outputs, labels
LOOKS = {
    "embeddings": STUDENT,
    "hidden states": STUDENT,
    "across layers": STUDENT,
    "texts": STUDENT,
    "vocabulary": ALIGNED,
    "inside blocks": STUDENT,
    "attention": EXTRA,
    "attention output": EXTRA,
    "outputs": TEACHER,
    "labels": BASELINE,
}


def what_is_aligned(methods: Sequence[Mapping], title: str = "What each method aligns, and by which loss") -> Figure:
    """A row for each method, a column for each place, and in it the losses.

    Args:
        methods: {name, year (None where unknown), alignments}; an alignment has `place`, `loss`, `layers` and `weight`,
            as `fakit.recipes.survey.survey` gives them.

    Raises:
        ValueError: no method, or a place that is none of `LOOKS`.
    """
    if not methods:
        raise ValueError("a survey needs at least one method; found none.")
    cells: dict[tuple[int, str], list] = {}
    for number, method in enumerate(methods):
        for found in method["alignments"]:
            if found.place not in LOOKS:
                raise ValueError(f"{method['name']} aligns {found.place!r}; the places are {', '.join(LOOKS)}.")
            cells.setdefault((number, found.place), []).append(found)
    places = [place for place in LOOKS if any(place == where for _, where in cells)]
    widths = [_width(place, [losses for (_, where), losses in cells.items() if where == place]) for place in places]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    rows = [max((len(cells.get((n, place), ())) for place in places), default=1) for n in range(len(methods))]
    tops = [sum(rows[:n]) for n in range(len(rows))]
    size = (MARGIN["l"] + sum(widths) + MARGIN["r"], MARGIN["t"] + ROW * sum(rows) + MARGIN["b"])
    figure = canvas(title, size, MARGIN, showlegend=False)
    for top in (*tops, sum(rows)):
        figure.add_shape(type="line", x0=0, x1=sum(widths), y0=top, y1=top, line={"color": GRID, "width": 1})
    for place, start in zip(places, starts, strict=True):
        heading = {
            "xanchor": "left",
            "yanchor": "bottom",
            "align": "left",
            "font": {"size": SMALL, "color": LOOKS[place].color},
        }
        note(figure, f"<b>{_in_two_lines(place)}</b>", start + 4, 0, yshift=6, **heading)
    for number, method in enumerate(methods):
        year = "" if method["year"] is None else f" {method['year']}"
        note(figure, f"{escape(method['name'])}{year}", 0, tops[number] + rows[number] / 2, xshift=-8, xanchor="right",
             font={"size": SMALL, "color": TEXT})  # fmt: skip
    for place, start in zip(places, starts, strict=True):
        role: Role = LOOKS[place]
        points = [
            (start + 12, tops[number] + i + 0.5, method["name"], found)
            for number, method in enumerate(methods)
            for i, found in enumerate(cells.get((number, place), ()))
        ]
        figure.add_scatter(
            x=[x for x, *_ in points],
            y=[y for _, y, *_ in points],
            mode="markers",
            marker=role.marker(9, opacity=1),
            hovertext=[_told(name, found) for *_, name, found in points],
            hoverinfo="text",
            name=place,
        )
        for x, y, _, found in points:
            if place != "labels":
                note(figure, escape(found.loss), x + 10, y, xanchor="left", font={"size": SMALL, "color": TEXT})
    hidden = {"visible": False, "showgrid": False, "zeroline": False, "fixedrange": True}
    figure.update_xaxes(range=(0, sum(widths)), **hidden).update_yaxes(range=(sum(rows), 0), **hidden)
    counts = {place: sum(where == place for _, where in cells) for place in places}
    listed = ", ".join(f"{place} {count}" for place, count in sorted(counts.items(), key=lambda one: -one[1]))
    return Figure(figure, f"{len(methods)} methods by what they align; how many align each: {listed}.")


def _width(place: str, cells: list[list]) -> float:
    """Px that a column takes: its longest loss, or its name in two lines."""
    longest = 0 if place == "labels" else max(len(found.loss) for losses in cells for found in losses)
    return max(22 + 6.5 * longest, 8 + 7.4 * max(map(len, _in_two_lines(place).split("<br>"))), 50) + 2


def _in_two_lines(place: str) -> str:
    return "embed-<br>dings" if place == "embeddings" else place.replace(" ", "<br>", 1)


def _told(name: str, found) -> str:
    layers = f", layers {found.layers}" if found.layers else ""
    return f"{escape(name)}: {found.place} by {escape(found.loss)}{escape(layers)}, weight {escape(found.weight)}"
