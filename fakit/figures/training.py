"""Training: loss terms over steps, gradient norms and their conflicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from fakit.figures.drawing import (
    canvas,
    check_keys,
    color_bar,
    distinct,
    heat_axes,
    label_width,
    log_axis,
    matrix,
    note,
    records,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, DIFFERENCE, EXTRA, SMALL, STUDENT, TEACHER, TEXT, Role, arm

NOT_TERMS = ("step", "epoch", "seed", "lr", "learning_rate", "grad_norm", "seconds", "time")
SETTINGS = ("weight/", "temperature")  # how names of what a trainer logs of weights and temperatures begin
TERM_STYLES = {
    "task": BASELINE,
    "features": STUDENT,
    "attention": EXTRA,
    "outputs": TEACHER,
    "total": ALIGNED,
    "loss": ALIGNED,
}


def term_style(name: str, position: int = 0) -> Role:
    """The role of a loss term; `weighted/features` and `features_weighted` take that of `features`."""
    for term, role in TERM_STYLES.items():
        if term in name.lower():
            return role
    return arm(name, position)


def add_term_bars(
    figure: go.Figure,
    values: Mapping[str, float],
    labels: Mapping[str, str],
    limit: float,
    room: float,
    **place: str,
) -> float:
    """A bar a term, first on top, its label at its end. Returns the right end of an axis that starts at 0 and holds
    bars and labels.

    Args:
        limit: the axis reaches at least so far.
        room: the share of the axis that is kept for the labels.
        place: xaxis and yaxis, in a panel.
    """
    names = list(values)[::-1]
    figure.add_bar(
        x=[values[name] for name in names],
        y=names,
        orientation="h",
        marker={"color": [term_style(name, i).color for i, name in enumerate(names)]},
        text=[labels[name] for name in names],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
        showlegend=False,
        **place,
    )
    return (max(*values.values(), limit, 0.0) or 1.0) / (1 - room)


def loss_curves(
    history: Any,
    terms: Sequence[str] | None = None,
    weighted: bool = True,
    events: Sequence[Mapping[str, Any]] = (),
    log: bool = False,
    title: str = "Loss by term",
) -> Figure:
    """One line a loss term over the optimizer's steps.

    Args:
        history: DataFrame or list of dicts with `step` and one column a term (rows may lack a term: it is skipped
            there).
        terms: columns to draw; by default every numeric one but step, epoch, learning rate and the like.
        weighted: whether the columns carry their weights (it names the axis).
        events: changes of weight while training, {step, name, old, new}: dotted lines.
        log: a logarithmic axis.
        title: short title.

    Raises:
        ValueError: no row, no `step`, or a term that no row has.
    """
    rows = records(history, ("step",), "loss_curves")
    numeric = (int, float, np.integer, np.floating)
    found = distinct(
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, numeric) and name not in NOT_TERMS and not name.startswith(SETTINGS)
    )
    terms = found if terms is None else list(terms)
    if missing := [name for name in terms if name not in found]:
        raise ValueError(f"no row has the terms {', '.join(missing)}; the history has {', '.join(found)}")
    figure = canvas(title, margin={"t": 96})
    parts = []
    for position, name in enumerate(terms):
        points = [
            (row["step"], row[name]) for row in rows if isinstance(row.get(name), numeric) and np.isfinite(row[name])
        ]
        steps, values = zip(*points, strict=True)
        role = term_style(name, position)
        figure.add_scatter(
            x=steps,
            y=values,
            name=name,
            mode="lines+markers" if len(points) <= 30 else "lines",
            line=role.line(3 if name in ("total", "loss") else 2),
            marker=role.marker(7),
            hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        parts.append(f"{name} {values[0]:.3g} → {values[-1]:.3g}")
    for event in events:
        line = {"color": TEXT, "dash": "dot", "width": 1.5}
        figure.add_shape(type="line", x0=event["step"], x1=event["step"], y0=0, y1=1, yref="y domain", line=line)
        label = f"{event['name']} {event['old']:g} → {event['new']:g}"
        note(figure, label, event["step"], 1, yref="y domain", yanchor="top", xanchor="left", xshift=4)
    numbers = {row["step"] for row in rows}
    first, last = min(numbers), max(numbers)
    figure.update_xaxes(title="step", range=(first, max(last, first + 1)), zeroline=False)
    drawn = [row[name] for row in rows for name in terms if isinstance(row.get(name), numeric)]
    axis = log_axis(drawn) if log else {"rangemode": "tozero"}
    figure.update_yaxes(title="weighted loss" if weighted else "loss before weighting", **axis)
    every = len(numbers) == last - first + 1  # a row for each step, wherever their numbers start
    span = f"Over {len(numbers)} steps" if every else f"From step {first:g} to step {last:g}"
    return Figure(figure, f"{span}: {', '.join(parts)}.")


def gradient_bars(norms: Mapping[str, float], title: str = "Gradient norm by term") -> Figure:
    """How hard each weighted term pulls on the student: the norm of its gradient.

    Args:
        norms: term → L2 norm of the gradient of its weighted loss over the student's parameters.

    Raises:
        ValueError: nothing to draw, or a norm that is negative or not finite.
    """
    check_keys(norms, "gradient_bars")
    if wrong := [name for name, value in norms.items() if not np.isfinite(value) or value < 0]:
        raise ValueError(
            f"gradient norms are finite and not negative; found {', '.join(f'{n} = {norms[n]}' for n in wrong)}"
        )
    terms = list(norms)[::-1]
    size = (720, 120 + 46 * len(terms))
    figure = canvas(title, size, {"l": label_width(terms) + 20, "t": 52, "r": 60}, showlegend=False, bargap=0.35)
    styles = [term_style(name, i) for i, name in enumerate(terms)]
    figure.add_bar(
        x=[norms[name] for name in terms],
        y=terms,
        orientation="h",
        marker={"color": [role.color for role in styles]},
        text=[f"{norms[name]:.3g}" for name in terms],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )
    top = max(norms.values()) or 1.0
    figure.update_xaxes(range=(0, 1.08 * top), title="L2 norm of the gradient").update_yaxes(showgrid=False)
    first = max(norms, key=norms.get)
    share = norms[first] / (sum(norms.values()) or 1.0)
    return Figure(
        figure,
        f"The {first} term pulls hardest: norm {norms[first]:.3g}, {100 * share:.0f} % of the sum of {len(terms)} "
        "norms.",
    )


def gradient_conflict(cosines: Any, terms: Sequence[str], title: str = "Do the terms agree?") -> Figure:
    """Cosine between the terms' gradients: 1 they pull together, 0 unrelated, below 0 they conflict.

    Args:
        cosines: (n, n), −1 to 1, symmetric.
        terms: n names.
        title: short title.

    Raises:
        ValueError: a matrix that is not n × n.
    """
    values = matrix(cosines, "cosines")
    if values.shape != (len(terms), len(terms)):
        raise ValueError(f"{len(terms)} terms need a ({len(terms)}, {len(terms)}) matrix; found {values.shape}")
    side = label_width(terms) + 20
    figure = canvas(title, (side + 430, 440), {"l": side, "r": 92, "t": 60, "b": 40})
    figure.add_heatmap(
        z=values,
        zmin=-1,
        zmax=1,
        colorscale=DIFFERENCE,
        colorbar=color_bar("cosine", tickvals=[-1, -0.5, 0, 0.5, 1]),
        text=[[f"{v:.2f}" for v in row] for row in values],
        texttemplate="%{text}",
        textfont={"size": SMALL},
        hovertemplate="row %{y}, column %{x}: %{z:.3f}<extra></extra>",
    )
    heat_axes(figure, list(terms), list(terms), down=True)
    off = [(values[i, j], terms[i], terms[j]) for i in range(len(terms)) for j in range(i)]
    if not off:
        return Figure(figure, f"One term only ({terms[0]}): nothing to compare.")
    low, one, other = min(off)
    verdict = "conflict" if low < 0 else "agree least"
    return Figure(
        figure,
        f"{one} and {other} {verdict} most (cosine {low:.2f})."
        if low < 0
        else f"No conflict: {one} and {other} {verdict} (cosine {low:.2f}).",
    )
