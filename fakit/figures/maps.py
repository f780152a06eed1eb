"""Layer maps: which teacher layer teaches which student layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fakit.figures.drawing import canvas, matrix, note
from fakit.figures.figure import Figure
from fakit.figures.story import check_pairs
from fakit.figures.theme import ALIGNED, SMALL, STUDENT, TEACHER


def layer_map(
    pairs: Sequence[tuple[int, int]],
    student_layers: int,
    teacher_layers: int,
    similarity: Any = None,
    title: str = "Layer map",
) -> Figure:
    """Two rows of layers and a link for each pair of the map; with `similarity`,
    links as wide as the layers are similar.

    Args:
        pairs: (student layer, teacher layer), 0 = embeddings, as in `LayerMap.pairs`.
        student_layers: number of the student's blocks L_S.
        teacher_layers: number of the teacher's blocks L_T.
        similarity: (L_S + 1, L_T + 1), rows and columns by layer number, 0 to 1 (CKA); written on each link.

    Raises:
        ValueError: a pair outside the layers, or a similarity of another shape.
    """
    pairs = check_pairs(pairs, student_layers, teacher_layers)
    if similarity is not None:
        similarity = matrix(similarity, "similarity")
        if similarity.shape != (student_layers + 1, teacher_layers + 1):
            raise ValueError(
                f"similarity has shape {similarity.shape}; a student of {student_layers} and a teacher of "
                f"{teacher_layers} layers need {(student_layers + 1, teacher_layers + 1)}: embeddings are layer 0"
            )
    widest = max(student_layers, teacher_layers)
    figure = canvas(title, (720, 320), {"l": 90, "r": 24, "t": 60, "b": 20}, showlegend=False)

    def place(layer: int, layers: int) -> float:
        return layer * widest / max(layers, 1)

    for number, (student, teacher) in enumerate(pairs):
        ends = ([place(student, student_layers), place(teacher, teacher_layers)], [0, 1])
        alike = None if similarity is None else float(similarity[student, teacher])
        alike = None if alike is not None and np.isnan(alike) else alike
        told = (
            ""
            if similarity is None
            else "<br>similarity not measured"
            if alike is None
            else f"<br>similarity {alike:.3f}"
        )
        hover = f"S{student} learns from T{teacher}{told}"
        width = 2.5 if alike is None else 1.5 + 7 * max(alike, 0)
        line = {"color": ALIGNED.color, "width": width, "dash": "dashdot" if alike is None else "solid"}
        figure.add_scatter(
            x=ends[0], y=ends[1], mode="lines", line=line, text=hover, hoverinfo="text", name=f"S{student}–T{teacher}"
        )
        if alike is not None:
            along = (
                0.24 if number % 2 == 0 else 0.38
            )  # near the pupils, where links lie apart; neighbors at two heights
            x = ends[0][0] + along * (ends[0][1] - ends[0][0])
            note(figure, f"{alike:.2f}", x, along, font={"size": SMALL, "color": "#FFFFFF"}, bgcolor="#00704F")
    size = float(np.clip(400 / (widest + 1), 12, 36))
    step = int(np.ceil(30 * (widest + 1) / 600))
    mapped = ({student for student, _ in pairs}, {teacher for _, teacher in pairs})
    for y, role, layers, used in ((0, STUDENT, student_layers, mapped[0]), (1, TEACHER, teacher_layers, mapped[1])):
        numbers = range(layers + 1)
        figure.add_scatter(
            x=[place(i, layers) for i in numbers],
            y=[y] * (layers + 1),
            mode="markers",
            marker=role.marker(size, opacity=1, line={"color": role.color, "width": 1}),
            hovertext=[
                f"{role.letter}{i}{' (embeddings)' if i == 0 else ''}: {'mapped' if i in used else 'not mapped'}"
                for i in numbers
            ],
            hoverinfo="text",
            name=role.name,
        )
        for i in numbers:
            if i % step == 0:
                shift = size / 2 + 11 if y else -0.62 * size - 12
                note(
                    figure,
                    f"{role.letter}{i}",
                    place(i, layers),
                    y,
                    yshift=shift,
                    font={"size": 13, "color": role.color},
                )
        heading = {"xref": "paper", "xshift": -78, "xanchor": "left", "font": {"size": 14, "color": role.color}}
        note(figure, f"<b>{role.name}</b>", 0, y, **heading)
    hidden = {"visible": False, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=(-0.06 * widest, 1.06 * widest), **hidden).update_yaxes(range=(-0.45, 1.4), **hidden)
    alike = {
        pair: "" if similarity is None or np.isnan(similarity[pair]) else f" ({similarity[pair]:.2f})" for pair in pairs
    }
    listed = ", ".join(f"S{s}←T{t}{alike[s, t]}" for s, t in pairs)
    left_out = [f"T{i}" for i in range(1, teacher_layers + 1) if i not in mapped[1]]
    summary = f"{len(pairs)} of {student_layers} student layers are mapped: {listed}" if pairs else "No layer is mapped"
    return Figure(figure, f"{summary}; teacher layers without a pupil: {', '.join(left_out) or 'none'}.")
