"""The method in one picture, and what a temperature does to a distribution."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from fakit.figures.drawing import axis_id, axis_key, canvas, check_keys, label_width, note, panel_title, panels
from fakit.figures.figure import Figure
from fakit.figures.theme import ARMS, SMALL, STUDENT, TEACHER, TEXT, WIDE, Role

TERMS = {
    "features": "hidden states of mapped layers",
    "attention": "attention maps of mapped layers",
    "outputs": "softened output distributions",
    "task": "labels",
}
WEIGHTS = {"features": "α", "attention": "β", "outputs": "γ", "task": "δ"}


def check_pairs(pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """The pairs (student, teacher) as ints, in order.

    Raises:
        ValueError: a pair names a layer that one of the sides does not have.
    """
    made = [(int(student), int(teacher)) for student, teacher in pairs]
    for student, teacher in made:
        if not (0 <= student <= student_layers and 0 <= teacher <= teacher_layers):
            raise ValueError(
                f"pair (S{student}, T{teacher}) does not exist: the student has layers S0…S{student_layers}, "
                f"the teacher T0…T{teacher_layers}; 0 is the output of the embeddings"
            )
    return made


def _box(figure: go.Figure, x: float, y: float, width: float, role: Role, solid: bool) -> None:
    """A layer: filled for the embeddings, tinted for a block."""
    figure.add_shape(
        type="rect",
        x0=x - width / 2,
        x1=x + width / 2,
        y0=y - 0.23,
        y1=y + 0.23,
        fillcolor=role.color if solid else role.tint(0.12),
        line={"color": role.color, "width": 1.5, "dash": "solid" if solid else role.dash},
        layer="below",
    )


def _link(figure: go.Figure, x0: float, y0: float, x1: float, y1: float, role: Role, width: float = 2.5) -> None:
    figure.add_shape(
        type="line",
        x0=x0,
        y0=y0,
        x1=x1,
        y1=y1,
        line={"color": role.color, "width": width, "dash": role.dash},
        layer="below",
    )


def distillation_story(
    pairs: Sequence[tuple[int, int]] = ((1, 2), (2, 4), (3, 6)),
    student_layers: int = 3,
    teacher_layers: int = 6,
    terms: Mapping[str, str] | None = None,
) -> Figure:
    """Feature-alignment distillation in one picture: two rows of layers, the map between them, and the loss terms.

    A term has the color and dash that it has in every other figure (`theme.ARMS`).

    Args:
        pairs: (student layer, teacher layer), 0 = embeddings, as in `LayerMap.pairs`.
        student_layers: number of the student's blocks L_S; nodes S0 … S{L_S} and the outputs are drawn.
        teacher_layers: number of the teacher's blocks L_T.
        terms: which terms to draw, name → what it compares, of "features", "attention", "outputs", "task"; all four
            by default.

    Raises:
        ValueError: a pair outside the layers, or a term that is none of the four.
    """
    terms = dict(TERMS if terms is None else terms)
    if unknown := [name for name in terms if name not in TERMS]:
        raise ValueError(f"terms are {', '.join(TERMS)}; found {', '.join(unknown)}")
    pairs = check_pairs(pairs, student_layers, teacher_layers)
    figure = canvas(
        "Distillation by feature alignment", (WIDE, 430), {"l": 20, "r": 20, "t": 48, "b": 16}, showlegend=False
    )
    teacher_y, student_y, left, right, end = 3.0, 1.0, 2.15, 7.5, 8.45

    def places(layers: int) -> np.ndarray:
        return np.linspace(left, right, layers + 1)

    tops, bottoms = places(teacher_layers), places(student_layers)
    figure.add_scatter(x=[0, 10], y=[0, 4], mode="markers", marker={"opacity": 0}, hoverinfo="skip")  # shapes need axes
    for y, role, xs in ((teacher_y, TEACHER, tops), (student_y, STUDENT, bottoms)):
        pitch = (right - left) / max(len(xs) - 1, 1)
        width, step = min(0.6, 0.78 * pitch), int(np.ceil(0.36 / pitch))
        for x, after in zip(xs, [*xs[1:], None], strict=True):
            _link(figure, x + width / 2, y, end - 0.45 if after is None else after - width / 2, y, role, 1.5)
        for i, x in enumerate(xs):
            _box(figure, x, y, width, role, solid=i == 0)
            if i % step == 0:
                inside = width >= 0.42
                ink = "#FFFFFF" if inside and i == 0 else TEXT
                outside = 0.0 if inside else 0.36 if role is TEACHER else -0.36
                note(figure, f"{role.letter}{i}", x, y + outside, font={"size": SMALL, "color": ink})
        _box(figure, end, y, 0.9, role, solid=False)
        note(figure, "outputs", end, y)
        note(figure, f"<b>{role.name}</b>", 0.0, y + 0.14, xanchor="left", font={"size": 14, "color": role.color})
        note(figure, "frozen" if role is TEACHER else "learns", 0.0, y - 0.16, xanchor="left")
    matched = [name for name in ("features", "attention") if name in terms]
    if matched:
        apart = 0.07 if len(matched) > 1 else 0.0  # two terms over one map: side by side
        for student, teacher in pairs:
            for name, aside in zip(matched, (-apart, apart), strict=False):
                ends = bottoms[student] + aside, student_y + 0.24, tops[teacher] + aside, teacher_y - 0.24
                _link(figure, *ends, ARMS[name])
        high = 2.5
        for name in matched:
            heading = {"xanchor": "left", "font": {"size": 13, "color": ARMS[name].color}}
            note(figure, f"<b>{WEIGHTS[name]} · {name}</b>", 0.0, high, **heading)
            what = "<br>".join(textwrap.wrap(terms[name], 19))
            note(figure, what, 0.0, high - 0.13, xanchor="left", yanchor="top", align="left")
            high -= 0.7
    if "outputs" in terms:
        role = ARMS["outputs"]
        _link(figure, end, student_y + 0.24, end, teacher_y - 0.24, role)
        note(figure, "<b>γ · outputs</b>", end + 0.14, 2.2, xanchor="left", font={"size": 13, "color": role.color})
        text = "<br>".join(textwrap.wrap(terms["outputs"], 16))
        note(figure, text, end + 0.14, 2.06, xanchor="left", yanchor="top", align="left")
    if "task" in terms:
        role = ARMS["task"]
        _link(figure, end, student_y - 0.24, end, 0.42, role)
        note(figure, f"<b>δ · task: {terms['task']}</b>", end, 0.24, font={"size": 13, "color": role.color})
    formula = "loss = " + " + ".join(f"{WEIGHTS[name]} · {name}" for name in terms)
    note(figure, formula, 0.0, 0.24, xanchor="left", font={"size": 14, "color": TEXT})
    note(figure, "embeddings", tops[0], teacher_y + (0.4 if tops[1] - tops[0] >= 0.54 else 0.6))
    hidden = {"visible": False, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=(-0.05, 10), **hidden).update_yaxes(range=(0, 3.75), **hidden)
    mapped = ", ".join(f"S{s}←T{t}" for s, t in pairs) or "no layer"
    summary = (
        f"A student of {student_layers} layers learns from a teacher of {teacher_layers}: {mapped}; "
        f"{len(terms)} loss terms: {', '.join(terms)}."
    )
    return Figure(figure, summary)


def softened(
    probabilities: Mapping[float, tuple[Sequence[float], Sequence[float] | None]],
    labels: Sequence[str],
    title: str = "Output distributions by temperature",
) -> Figure:
    """Teacher's and student's distributions for one input, one panel a temperature.

    Args:
        probabilities: temperature τ → (teacher (C,), student (C,) or None); each sums to 1.
        labels: C class names (or token strings).

    Raises:
        ValueError: nothing to draw, a distribution whose length is not C, or one that does not sum to 1.
    """
    check_keys(probabilities, "softened")
    for temperature, pair in probabilities.items():
        for role, values in zip((TEACHER, STUDENT), pair, strict=True):
            if values is None:
                continue
            if len(values) != len(labels) or abs(float(np.sum(values)) - 1) > 1e-3:
                raise ValueError(
                    f"the {role.name}'s distribution at temperature {temperature:g} has {len(values)} values that sum "
                    f"to {float(np.sum(values)):.3f}; {len(labels)} labels need {len(labels)} probabilities with sum 1"
                )
    wide = len(probabilities) > 2
    turn = any(label_width([label]) > (860 if wide else 600) / len(probabilities) / len(labels) for label in labels)
    below = 40 + (label_width(labels) if turn else 20)
    figure = canvas(title, (WIDE if wide else 720, 320 + below), {"t": 96, "b": below}, barmode="group", bargap=0.25)
    shown: set[str] = set()
    for number, ((temperature, pair), domain) in enumerate(
        zip(probabilities.items(), panels(len(probabilities), 0.04), strict=True)
    ):
        for role, values in zip((TEACHER, STUDENT), pair, strict=True):
            if values is not None:
                figure.add_bar(
                    x=list(labels),
                    y=np.asarray(values, float),
                    name=role.name,
                    marker=role.bar(),
                    showlegend=role.name not in shown,
                    legendgroup=role.name,
                    xaxis=axis_id("x", number),
                    yaxis=axis_id("y", number),
                    hovertemplate=f"{role.name}, τ = {temperature:g}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
                )
                shown.add(role.name)
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": axis_id("y", number),
                    "type": "category",
                    "tickangle": -90 if turn else 0,
                },
                axis_key("y", number): {
                    "range": (0, 1),
                    "anchor": axis_id("x", number),
                    "showticklabels": number == 0,
                    "title": {"text": "probability" if number == 0 else ""},
                },
            }
        )
        panel_title(figure, number, f"τ = {temperature:g}")
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1.09})
    parts = []
    for temperature, (teacher, student) in probabilities.items():
        top = int(np.argmax(teacher))
        part = f"at temperature {temperature:g} the teacher gives ‘{labels[top]}’ {float(teacher[top]):.2f}"
        parts.append(part + (f" and the student {float(student[top]):.2f}" if student is not None else ""))
    sentence = "; ".join(parts)
    return Figure(figure, sentence[0].upper() + sentence[1:] + ".")
