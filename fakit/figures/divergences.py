"""Divergences: where each leads a student, which classes it pulls, what temperature and ranks do to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from fakit.figures.drawing import (
    axis_id,
    axis_key,
    canvas,
    check_keys,
    color_bar,
    heat_axes,
    label_width,
    log_axis,
    matrix,
    note,
    panel_title,
    panels,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, DIFFERENCE, EXTRA, SMALL, STUDENT, TEACHER, TEXT, WIDE

_LINES = (STUDENT, EXTRA, ALIGNED, BASELINE, TEACHER)
_ACROSS = 3  # panels side by side


def fitted_students(
    teacher: Sequence[float], students: Mapping[str, Sequence[float]], title: str = "Where each loss leads"
) -> Figure:
    """One panel a loss: the teacher's distribution as bars, and as a line that of the student fitted to it.

    Args:
        teacher: probabilities (C,).
        students: name of a loss → probabilities (C,) of the student that it led to.
        title: short title.

    Raises:
        ValueError: nothing to draw, or a side that is no distribution over the teacher's classes.
    """
    check_keys(students, "fitted_students")
    p = _distribution("the teacher", teacher, len(teacher))
    fits = {name: _distribution(name, q, len(p)) for name, q in students.items()}
    across = min(_ACROSS, len(fits))
    down = ceil(len(fits) / across)
    tall, between, above, below = 220 if len(fits) == 1 else 150, 56, 88, 56  # px
    plot = tall * down + between * (down - 1)
    figure = canvas(title, (720 if across == 1 else WIDE, above + plot + below), {"t": above, "b": below}, bargap=0.1)
    tops = [1 - i * (tall + between) / plot for i in range(down)]
    rows = [(high - tall / plot, high) for high in tops]
    top, classes, said = 1.1 * max(p.max(), *(q.max() for q in fits.values())), np.arange(len(p)), []
    for number, ((name, q), across_at) in enumerate(zip(fits.items(), panels(across, 0.05) * down, strict=False)):
        place: dict[str, Any] = {"xaxis": axis_id("x", number), "yaxis": axis_id("y", number), "showlegend": not number}
        figure.add_bar(
            x=classes, y=p, name="teacher", marker={"color": TEACHER.tint(0.55), "line": {"width": 0}},
            hovertemplate="class %{x}: %{y:.3f}<extra>teacher</extra>", **place,
        )  # fmt: skip
        figure.add_scatter(
            x=classes,
            y=q,
            mode="lines",
            name="student",
            line=STUDENT.line(2.5),
            hovertemplate=f"class %{{x}}: %{{y:.3f}}<extra>{name}</extra>",
            **place,
        )
        row, last = number // across, number + across >= len(fits)
        labels = {"x": "class" if last else "", "y": "probability" if number % across == 0 else ""}
        x_axis = {"domain": across_at, "anchor": axis_id("y", number), "title": {"text": labels["x"]}}
        y_axis = {"domain": rows[row], "anchor": axis_id("x", number), "title": {"text": labels["y"]}}
        y_axis |= {"range": (0, top), "nticks": 5, "showticklabels": number % across == 0}
        x_axis |= {"range": (-0.7, len(p) - 0.3), "showgrid": False}
        figure.update_layout({axis_key("x", number): x_axis, axis_key("y", number): y_axis})
        panel_title(figure, number, f"<b>{name}</b>")
        said.append(f"{name} {float(np.minimum(p, q).sum()):.2f} (most likely class {int(q.argmax())})")
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1 + 24 / plot})
    return Figure(figure, f"Overlap with the teacher, whose most likely class is {int(p.argmax())}: {', '.join(said)}.")


def class_pulls(
    teacher: Sequence[float],
    student: Sequence[float],
    pulls: Mapping[str, Sequence[float]],
    regions: Mapping[str, tuple[int, int]] | None = None,
    limit: float = 0.1,
    title: str = "Which classes each loss pulls",
) -> Figure:
    """Two distributions, and below them one row a loss: how it pulls the logit of each class.

    A row is divided by the sum of its absolute values, so that rows compare whatever the losses' sizes.

    Args:
        teacher, student: probabilities (C,), above 0.
        pulls: name of a loss → gradient in the student's logits (C,).
        regions: name → (first class, last class), shaded and named.
        limit: where the colors end, as a share of a row's whole pull.
        title: short title.

    Raises:
        ValueError: nothing to draw, sides or rows that do not fit each other, or a number that is not finite.
    """
    check_keys(pulls, "class_pulls")
    p, q = _distribution("the teacher", teacher, len(teacher)), _distribution("the student", student, len(teacher))
    values = matrix([np.asarray(row, float) for row in pulls.values()], "pulls")
    if values.shape[1] != len(p) or not np.isfinite(values).all():
        raise ValueError(f"class_pulls: {len(p)} classes need finite rows ({len(p)},); found {values.shape}")
    sums = np.abs(values).sum(1, keepdims=True)
    shares = values / np.where(sums > 0, sums, 1.0)
    names, side, heat, above = list(pulls), label_width(pulls) + 20, 24 * len(pulls), 170
    plot = heat + above + 28
    figure = canvas(title, (WIDE, plot + 152), {"l": max(side, 70), "r": 104, "t": 96, "b": 56})
    for role, values_of in ((TEACHER, p), (STUDENT, q)):
        figure.add_scatter(
            x=list(range(len(p))), y=values_of, mode="lines+markers", name=role.name, line=role.line(1.8),
            marker=role.marker(6), hovertemplate=f"class %{{x}}: %{{y:.4f}}<extra>{role.name}</extra>",
        )  # fmt: skip
    figure.add_heatmap(
        z=shares, zmin=-limit, zmax=limit, colorscale=DIFFERENCE, xaxis="x2", yaxis="y2",
        colorbar=color_bar(
            "share of the row's pull", y=heat / plot / 2, length=heat / plot, tickvals=[-limit, 0, limit],
            ticktext=[f"up {100 * limit:g} %", "0", f"down {100 * limit:g} %"],
        ),
        hovertemplate="%{y}, class %{x}: %{z:+.1%}<extra></extra>",
    )  # fmt: skip
    low = min(p.min(), q.min())
    figure.update_layout(
        xaxis={
            "domain": (0, 1),
            "anchor": "y",
            "range": (-0.5, len(p) - 0.5),
            "showticklabels": False,
            "showgrid": False,
        },
        yaxis={
            "domain": (1 - above / plot, 1),
            "anchor": "x",
            "title": {"text": "probability"},
            **log_axis([low, 1.0]),
        },
        xaxis2={"domain": (0, 1), "anchor": "y2"},
        yaxis2={"domain": (0, heat / plot), "anchor": "x2"},
        legend={"x": 1, "xanchor": "right", "y": 1 + 22 / plot},
    )
    heat_axes(figure, names, [str(c) for c in range(len(p))], 1, down=True)
    figure.update_layout(xaxis2={"title": {"text": "class"}})
    for name, (first, last) in (regions or {}).items():
        ends: dict[str, Any] = {"type": "rect", "x0": first - 0.5, "x1": last + 0.5, "y0": 0, "y1": 1, "layer": "below"}
        figure.add_shape(yref="y domain", fillcolor="rgba(119,119,119,0.16)", line={"width": 0}, **ends)
        edge = {"color": TEXT, "width": 1.5, "dash": "dot"}
        figure.add_shape(xref="x2", yref="y2 domain", line=edge, **ends | {"layer": "above"})
        note(figure, name, (first + last) / 2, 1, yref="y domain", yanchor="bottom", yshift=2)
    said = []
    for name, row in zip(names, np.abs(shares), strict=True):
        parts = [
            f"{100 * row[first : last + 1].sum():.0f} % on {what}" for what, (first, last) in (regions or {}).items()
        ]
        said.append(f"{name} {', '.join(parts)}" if parts else f"{name} most on class {int(row.argmax())}")
    return Figure(figure, f"Pull on {len(p)} classes: {'; '.join(said)}.")


def by_temperature(
    temperatures: Sequence[float],
    cosines: Mapping[str, Sequence[float]],
    norms: Mapping[str, Sequence[float]],
    reference: str = "the squared difference",
    title: str = "Gradients by temperature",
) -> Figure:
    """Two panels over τ: which way each loss pulls, beside a reference, and how hard.

    Args:
        temperatures: τ > 0, (N,).
        cosines: name of a loss → cosine of its gradient and the reference's, (N,).
        norms: name of a loss → norm of its gradient, (N,), above 0.
        reference: the loss with whose gradient the cosines are taken.
        title: short title.

    Raises:
        ValueError: nothing to draw, other losses in the two panels, or a line of another length.
    """
    check_keys(cosines, "by_temperature")
    if list(cosines) != list(norms):
        raise ValueError(f"by_temperature: cosines of {', '.join(cosines)}, but norms of {', '.join(norms)}")
    taus = [float(tau) for tau in temperatures]
    figure = canvas(title, (WIDE, 380), {"t": 92})
    for number, (lines, domain) in enumerate(zip((cosines, norms), panels(2, 0.12), strict=True)):
        for position, (name, line) in enumerate(lines.items()):
            if len(line) != len(taus):
                raise ValueError(f"{name} has {len(line)} values at {len(taus)} temperatures: give one a temperature")
            role = _LINES[position % len(_LINES)]
            figure.add_scatter(
                x=taus, y=list(line), mode="lines+markers", name=name, line=role.line(), marker=role.marker(7),
                legendgroup=name, showlegend=number == 0, xaxis=axis_id("x", number), yaxis=axis_id("y", number),
                hovertemplate=f"τ = %{{x:g}}: %{{y:.3f}}<extra>{name}</extra>",
            )  # fmt: skip
        x_axis = {
            "domain": domain,
            "anchor": axis_id("y", number),
            **log_axis(taus),
            "title": {"text": "temperature τ"},
        }
        figure.update_layout({axis_key("x", number): x_axis, axis_key("y", number): {"anchor": axis_id("x", number)}})
    every = [value for line in cosines.values() for value in line]
    figure.update_layout(
        yaxis={"range": (min(0.0, *every) - 0.02, 1.04), "title": {"text": "cosine"}},
        yaxis2={**log_axis([value for line in norms.values() for value in line]), "title": {"text": "norm"}},
        legend={"y": 1 + 24 / 232},
    )
    panel_title(figure, 0, f"<b>direction</b>: cosine with {reference}")
    panel_title(figure, 1, "<b>size</b>: norm of the gradient, τ² included")
    said = ", ".join(
        f"{name} {line[0]:.2f} → {line[-1]:.2f} (norm × {norms[name][-1] / norms[name][0]:.2g})"
        for name, line in cosines.items()
    )
    return Figure(figure, f"Cosine with the gradient of {reference} from τ = {taus[0]:g} to {taus[-1]:g}: {said}.")


def moved_logit(
    values: Sequence[float],
    ranks: Mapping[str, Sequence[float]],
    measures: Mapping[str, Sequence[float]],
    at: float,
    title: str = "One logit moves",
) -> Figure:
    """Two panels over the value of one logit: the soft rank of every class, and what losses and measures make of it.

    Args:
        values: of the logit that moves, (N,), rising.
        ranks: class → its soft rank (N,); the first one is that of the logit that moves, and drawn thicker.
        measures: name → (N,), each in 0…2.
        at: where the logit stands now: a vertical line, and a point on every curve.
        title: short title.

    Raises:
        ValueError: nothing to draw, a curve of another length, or `at` outside of the values.
    """
    check_keys(ranks, "moved_logit")
    check_keys(measures, "moved_logit")
    x = np.asarray(values, float)
    if not x[0] <= at <= x[-1]:
        raise ValueError(f"moved_logit: the logit stands at {at:g}, outside of {x[0]:g} to {x[-1]:g}")
    moved, here, said = next(iter(ranks)), int(np.abs(x - at).argmin()), []
    figure = canvas(title, (WIDE, 380), {"t": 92})
    for number, (lines, domain) in enumerate(zip((ranks, measures), panels(2, 0.12), strict=True)):
        for position, (name, line) in enumerate(lines.items()):
            if len(line) != len(x):
                raise ValueError(f"{name} has {len(line)} values at {len(x)} places: give one a place")
            role = _LINES[position % len(_LINES)]
            place: dict[str, Any] = {"xaxis": axis_id("x", number), "yaxis": axis_id("y", number), "name": name}
            hover = f"%{{x:.2f}}: %{{y:.2f}}<extra>{name}</extra>"
            drawn = role.line(3.5 if name == moved else 2)
            figure.add_scatter(
                x=x, y=list(line), mode="lines", line=drawn, showlegend=number == 1, hovertemplate=hover, **place
            )
            point = role.marker(10)
            figure.add_scatter(
                x=[x[here]],
                y=[line[here]],
                mode="markers",
                marker=point,
                showlegend=False,
                hovertemplate=hover,
                **place,
            )
            said.append(f"{name} {line[here]:.2f}")
            if number == 0:
                ink = {"size": SMALL + 1, "color": role.color}
                note(figure, f"<b>{name}</b>", float(x[-1]), float(line[-1]), xanchor="left", xshift=6, font=ink)
        x_axis = {"domain": domain, "anchor": axis_id("y", number), "range": (x[0], x[-1])}
        x_axis["title"] = {"text": f"logit of {moved}"}
        figure.update_layout({axis_key("x", number): x_axis, axis_key("y", number): {"anchor": axis_id("x", number)}})
        now = {"color": TEXT, "width": 1.5, "dash": "dot"}
        ends: dict[str, Any] = {"x0": at, "x1": at, "y0": 0, "y1": 1}
        references = {"xref": axis_id("x", number), "yref": f"{axis_id('y', number)} domain"}
        figure.add_shape(type="line", line=now, **ends, **references)
    figure.update_layout(
        yaxis={"range": (0.8, len(ranks) + 0.2), "tickvals": list(range(1, len(ranks) + 1)), "title": {"text": "rank"}},
        yaxis2={"range": (-0.05, 2.05), "title": {"text": "value"}},
        legend={"x": 1, "xanchor": "right", "y": 1 + 24 / 232},
    )
    panel_title(figure, 0, "<b>soft ranks</b>")
    panel_title(figure, 1, "<b>what is made of them</b>")
    ranked, measured = said[: len(ranks)], said[len(ranks) :]
    return Figure(figure, f"With {moved} at {at:g}, the ranks are {', '.join(ranked)}; {', '.join(measured)}.")


def _distribution(whose: str, given: Sequence[float], classes: int) -> np.ndarray:
    made = np.asarray(given, float)
    if made.shape != (classes,) or not (made >= 0).all() or abs(made.sum() - 1) > 1e-3:
        raise ValueError(
            f"{whose} has shape {made.shape} and sum {made.sum():.3f}; {classes} classes need as many probabilities, "
            "with sum 1"
        )
    return made
