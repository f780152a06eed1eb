"""Several layer maps at a glance: one small drawing each, all at one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fakit.figures.drawing import canvas, check_keys, note
from fakit.figures.figure import Figure
from fakit.figures.story import check_pairs
from fakit.figures.theme import ALIGNED, SMALL, STUDENT, TEACHER, TEXT, WIDE

COLUMNS = 4
PITCH = (1.0, 1.0)  # one cell, of which a drawing takes 0.78 × 0.42


def layer_map_gallery(
    maps: Mapping[str, Sequence[tuple[int, int]]],
    student_layers: int,
    teacher_layers: int,
    title: str = "Layer maps",
) -> Figure:
    """Four small drawings a row: the teacher's layers above, the student's below, both numbered, a link for each pair.

    Args:
        maps: name → pairs (student layer, teacher layer), 0 = embeddings, as in `LayerMap.pairs`.
        student_layers: number of the student's blocks L_S.
        teacher_layers: number of the teacher's blocks L_T.
        title: short title.

    Raises:
        ValueError: no map, or a pair outside the layers (it says of which map).
    """
    check_keys(maps, "layer_map_gallery")
    checked = {}
    for name, pairs in maps.items():
        try:
            checked[name] = check_pairs(pairs, student_layers, teacher_layers)
        except ValueError as error:
            raise ValueError(f"map {name!r}: {error}") from None
    rows = -(-len(checked) // COLUMNS)
    figure = canvas(title, (WIDE, 96 + 150 * rows), {"l": 24, "r": 24, "t": 84, "b": 12}, barmode="overlay")
    widest = max(student_layers, teacher_layers, 1)
    size = max(5.0, min(11.0, 90 / (widest + 1)))
    pixels = 0.78 * (WIDE - 48) / COLUMNS  # a drawing's width
    for number, (name, pairs) in enumerate(checked.items()):
        left, base = number % COLUMNS * PITCH[0], -(number // COLUMNS) * PITCH[1]

        def place(layer: int, layers: int, left: float = left) -> float:
            return left + 0.78 * layer / max(layers, 1)

        # one trace a map: None lifts the pen between two links
        xs = [x for s, t in pairs for x in (place(s, student_layers), place(t, teacher_layers), None)]
        ys = [y for _ in pairs for y in (base, base + 0.42, None)]
        if pairs:
            hover = f"{name}: " + ", ".join(f"S{s}←T{t}" for s, t in pairs)
            figure.add_scatter(
                x=xs, y=ys, mode="lines", line=ALIGNED.line(2), hoverinfo="text", text=hover, showlegend=False
            )
        for role, layers, y in ((TEACHER, teacher_layers, base + 0.42), (STUDENT, student_layers, base)):
            figure.add_scatter(
                x=[place(i, layers) for i in range(layers + 1)],
                y=[y] * (layers + 1),
                mode="markers",
                marker=role.marker(size, opacity=1),
                hovertext=[f"{role.letter}{i}" + (" (embeddings)" if i == 0 else "") for i in range(layers + 1)],
                hoverinfo="text",
                name=f"{role.name}, {role.letter}0 to {role.letter}{layers}",
                showlegend=number == 0,
            )
            room = 16 + 6 * len(str(layers))  # px that "T6" and "T12" need
            every = -(-room * layers // int(pixels)) or 1
            for i in range(0, layers + 1, every):
                beside = {"yshift": 14 if role is TEACHER else -14, "font": {"size": SMALL, "color": role.color}}
                note(figure, f"{role.letter}{i}", place(i, layers), y, **beside)
        heading = {"xanchor": "left", "yanchor": "bottom", "yshift": 24, "font": {"size": SMALL + 1, "color": TEXT}}
        note(figure, f"<b>{name}</b>", left - 0.02, base + 0.42, **heading)
    hidden = {"visible": False, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=(-0.06, COLUMNS - 0.16), **hidden)
    figure.update_yaxes(range=(-(rows - 1) - 0.2, 0.7), **hidden)
    parts = [
        f"{name}: " + (", ".join(f"S{s}←T{t}" for s, t in pairs) or "no layer is mapped")
        for name, pairs in checked.items()
    ]
    return Figure(
        figure,
        f"{len(checked)} maps of {student_layers} student on {teacher_layers} teacher layers. "
        + "; ".join(parts)
        + ".",
    )
