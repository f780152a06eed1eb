"""How the terms pull: what each adds to the loss, how hard its gradient pulls, in which layer,
and against which other.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    panel_title,
)
from fakit.figures.figure import Figure
from fakit.figures.theme import DIFFERENCE, SMALL, WIDE
from fakit.figures.training import add_term_bars, term_style

SIZE = (WIDE, 612)  # px, without what the names below the cosines take
TOP, BOTTOM = (0.64, 1.0), (0.0, 0.43)  # of the plot area's height
LEFT, RIGHT = (0.0, 0.44), (0.58, 1.0)


def term_pulls(
    losses: Mapping[str, float],
    norms: Mapping[str, Mapping[str, float]],
    cosines: Any,
    where: str = "all",
    limits: tuple[float, float, float] = (0.0, 0.0, 0.0),
    title: str = "How the terms pull",
) -> Figure:
    """Four panels: weighted loss by term, weighted gradient norm by term, the same by layer,
    and cosines between the gradients.

    Args:
        losses: term → weight × loss; 0 for a term that is off. The terms, in this order.
        norms: part of the student ("all", then "S0", "S1" … "head") → term → norm of the gradient of its weighted loss.
        cosines: (k, k), −1 to 1, symmetric; NaN where a term has no gradient, shown as –.
        where: the part of the student whose cosines these are.
        limits: right or upper ends of the axes (loss, norm, norm by layer), so that pictures beside or after each other
            compare; never below the data.
        title: short title.

    Raises:
        ValueError: nothing to draw, norms without "all" or without a term, a number that is not finite,
            cosines of another shape.
    """
    check_keys(losses, "term_pulls")
    terms = list(losses)
    values = matrix(cosines, "cosines")
    if values.shape != (len(terms), len(terms)):
        raise ValueError(f"{len(terms)} terms need a ({len(terms)}, {len(terms)}) matrix; found {values.shape}")
    if "all" not in norms or any(name not in by for by in norms.values() for name in terms):
        raise ValueError(f"term_pulls needs norms of 'all', for each of {', '.join(terms)}; found {dict(norms)}")
    numbers = [("loss", losses), *(("gradient norm", by) for by in norms.values())]
    if wrong := [f"{name}'s {what}" for what, by in numbers for name in terms if not np.isfinite(by[name])]:
        raise ValueError(f"term_pulls: {', '.join(dict.fromkeys(wrong))} is not finite")

    side = label_width(terms) + 20
    below = 24 + label_width(terms)  # the names stand upright where the columns are narrower than they are
    figure = canvas(title, (SIZE[0], SIZE[1] + below), {"l": side, "r": 92, "t": 76, "b": below}, bargap=0.35)
    figure.update_layout(legend={"x": 0, "y": BOTTOM[1] + 0.045, "yanchor": "bottom"})
    total = sum(losses.values())
    shares = {name: f"{value:.3g} ({100 * value / total:.0f} %)" if value else "off" for name, value in losses.items()}
    pulls = {name: f"{norms['all'][name]:.3g}" if losses[name] or norms["all"][name] else "off" for name in terms}
    _bars(figure, 0, losses, shares, limits[0], "weight × loss", LEFT)
    _bars(figure, 1, {name: norms["all"][name] for name in terms}, pulls, limits[1], "norm of weight × gradient", RIGHT)
    _by_layer(figure, 2, {part: by for part, by in norms.items() if part != "all"}, terms, limits[2])
    _cosines(figure, 3, values, terms)
    place = "the whole student" if where == "all" else where
    headings = ("loss by term", "pull by term", "pull by layer", f"cosine of gradients, {place}")
    for number, heading in enumerate(headings):
        panel_title(figure, number, f"<b>{heading}</b>")
    return Figure(figure, _summary(losses, norms["all"], values, terms, place))


def _bars(
    figure: go.Figure,
    number: int,
    values: Mapping[str, float],
    labels: Mapping[str, str],
    limit: float,
    axis: str,
    across,
):
    room = 8 * max(map(len, labels.values())) / 360  # the labels stand to the right of the bars
    end = add_term_bars(figure, values, labels, limit, room, xaxis=axis_id("x", number), yaxis=axis_id("y", number))
    figure.update_layout(
        {
            axis_key("x", number): {
                "domain": across,
                "anchor": axis_id("y", number),
                "range": (0, end),
                "title": {"text": axis},
                "nticks": 5,
            },
            axis_key("y", number): {
                "domain": TOP,
                "anchor": axis_id("x", number),
                "showgrid": False,
                "showticklabels": True,
            },
        }
    )


def _by_layer(figure: go.Figure, number: int, norms: Mapping[str, Mapping[str, float]], terms: list[str], limit: float):
    parts = list(norms)
    for position, name in enumerate(terms):
        role = term_style(name, position)
        figure.add_scatter(
            x=parts,
            y=[by[name] for by in norms.values()],
            mode="lines+markers",
            name=name,
            line=role.line(),
            marker=role.marker(9),
            hovertemplate=f"{name}, %{{x}}: %{{y:.3g}}<extra></extra>",
            xaxis=axis_id("x", number),
            yaxis=axis_id("y", number),
        )
    highest = max([limit, *(by[name] for by in norms.values() for name in terms)]) or 1.0
    figure.update_layout(
        {
            axis_key("x", number): {"domain": LEFT, "anchor": axis_id("y", number), "type": "category"},
            axis_key("y", number): {
                "domain": BOTTOM,
                "anchor": axis_id("x", number),
                "range": (0, 1.08 * highest),
                "title": {"text": "norm of weight × gradient"},
            },
        }
    )


def _cosines(figure: go.Figure, number: int, values: np.ndarray, terms: list[str]) -> None:
    figure.add_heatmap(
        z=values,
        zmin=-1,
        zmax=1,
        colorscale=DIFFERENCE,
        colorbar=color_bar("cosine", y=sum(BOTTOM) / 2, length=BOTTOM[1] - BOTTOM[0], tickvals=[-1, -0.5, 0, 0.5, 1]),
        text=[[f"{v:.2f}".replace("-0.00", "0.00") if np.isfinite(v) else "–" for v in row] for row in values],
        texttemplate="%{text}",
        textfont={"size": SMALL},
        hovertemplate="row %{y}, column %{x}: %{z:.3f}<extra></extra>",
        xaxis=axis_id("x", number),
        yaxis=axis_id("y", number),
    )
    figure.update_layout(
        {
            axis_key("x", number): {"domain": RIGHT, "anchor": axis_id("y", number)},
            axis_key("y", number): {"domain": BOTTOM, "anchor": axis_id("x", number)},
        }
    )
    heat_axes(figure, terms, terms, number, down=True)
    if (missing := hatch(~np.isfinite(values), number)) is not None:
        figure.add_trace(missing)


def _summary(losses: Mapping, norms: Mapping, values: np.ndarray, terms: list[str], place: str) -> str:
    total = sum(losses.values())
    largest, hardest = max(losses, key=losses.get), max(terms, key=lambda name: norms[name])
    share = f", {100 * losses[largest] / total:.0f} % of it {largest}" if total else ""
    pulling = [value for value in norms.values() if value > 0]
    alike = len(pulling) > 1 and max(pulling) < 1.01 * min(pulling)
    pulls = "all pull alike" if alike else f"{hardest} pulls hardest"
    text = f"Total loss {total:.3g}{share}; {pulls} (gradient norm {norms[hardest]:.3g})"
    pairs = [
        (values[i, j], terms[j], terms[i]) for i in range(len(terms)) for j in range(i) if np.isfinite(values[i, j])
    ]
    if not pairs:
        return f"{text}; no two terms have a gradient in {place}."
    low, one, other = min(pairs)
    verdict = "conflict" if low < 0 else "agree least"
    return f"{text}; in {place} {one} and {other} {verdict} (cosine {low:.2f})."
