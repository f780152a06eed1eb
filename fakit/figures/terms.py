"""The loss of one moment, term by term: what each weight makes of each raw loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fakit.figures.drawing import canvas, check_keys, label_width
from fakit.figures.figure import Figure
from fakit.figures.training import add_term_bars


def loss_bars(
    terms: Mapping[str, float],
    weights: Mapping[str, float],
    limit: float | None = None,
    title: str = "Weighted loss by term",
) -> Figure:
    """One bar a term, as long as weight × loss; the label spells the product out.

    Args:
        terms: term → its loss before weighting; a term that was not computed (weight 0) may be missing.
        weights: term → weight ≥ 0; these are the terms drawn, in this order.
        limit: right end of the axis in units of loss, so that pictures beside or after each other compare; from the
            data where None, and never below them.
        title: short title.

    Raises:
        ValueError: nothing to draw, a loss without weight, a weight above 0 without loss,
            or a number that is not finite.
    """
    check_keys(weights, "loss_bars")
    if unknown := [name for name in terms if name not in weights]:
        raise ValueError(f"loss_bars: no weight for {', '.join(unknown)}; weights are given for {', '.join(weights)}")
    if missing := [name for name, weight in weights.items() if weight and name not in terms]:
        raise ValueError(f"loss_bars: no loss for {', '.join(missing)}, whose weight is above 0; give it, or weight 0")
    products = {name: weight * float(terms.get(name, 0.0)) for name, weight in weights.items()}
    if wrong := [name for name, value in products.items() if not np.isfinite(value)]:
        raise ValueError(f"loss_bars: {', '.join(wrong)} is not finite; Breakdown.check() names the layer at fault")
    names = list(weights)
    labels = {
        name: f"{weight:.3g} × {terms[name]:.3g} = {products[name]:.3g}" if weight else "off (weight 0)"
        for name, weight in weights.items()
    }
    total = sum(products.values())
    figure = canvas(
        title, (720, 116 + 46 * len(names)), {"l": label_width(names) + 20, "t": 48}, showlegend=False, bargap=0.35
    )
    # the labels stand to the right of the bars: room for the longest of them, at about 8 px a character
    room = min(0.45, 8 * max(map(len, labels.values())) / (720 - label_width(names) - 44))
    end = add_term_bars(figure, products, labels, limit or 0.0, room)
    figure.update_xaxes(range=(0, end), title="weight × loss").update_yaxes(showgrid=False)
    parts = ", ".join(f"{name} {labels[name]}" for name in weights)
    return Figure(figure, f"Total loss {total:.4g}: {parts}.")
