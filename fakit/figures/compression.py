"""Compression: what a budget of parameters leaves of each block, and what taking out a layer costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fakit.figures.drawing import canvas, check_keys, panel_title
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, GRID, ROLES, STUDENT, TEACHER, WIDE

LEFT, RIGHT = (0.0, 0.42), (0.55, 1.0)  # of the plot area's width


def rank_plan(
    rows: Sequence[Any], before: int, after: int, title: str = "What a budget leaves of each block"
) -> Figure:
    """Two panels: parameters of each block before and after, and the predicted error of each weight.

    Args:
        rows: one for each weight, as `Plan.rows` of `fakit.compression.low_rank` gives them: layer, module, rank (None
            where it stays dense), before, after, error, stable_rank_weights.
        before, after: parameters of the whole model.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rank_plan: nothing to draw, the plan has no rows")
    layers = sorted({row.layer for row in rows})
    kinds = list(dict.fromkeys(_kind(row.module) for row in rows))
    figure = canvas(title, (WIDE, 430), {"l": 64, "r": 12, "t": 76, "b": 96}, barmode="stack", bargap=0.3)
    stays = {i: sum(row.after for row in rows if row.layer == i) for i in layers}
    saved = {i: sum(row.before - row.after for row in rows if row.layer == i) for i in layers}
    for name, share, look in (
        ("stays", stays, {"color": STUDENT.color}),
        ("saved", saved, {"color": GRID, "pattern": {"shape": "/", "fgcolor": BASELINE.color, "size": 6}}),
    ):
        figure.add_bar(
            x=layers,
            y=[share[i] / 1e6 for i in layers],
            marker=look,
            name=name,
            hovertext=[f"block {i}: {share[i]:,} of {stays[i] + saved[i]:,} {name}" for i in layers],
            hoverinfo="text",
        )
    for number, kind in enumerate(kinds):
        role = ROLES[number % len(ROLES)]
        mine = [row for row in rows if _kind(row.module) == kind]
        figure.add_scatter(
            x=[row.layer for row in mine],
            y=[row.error for row in mine],
            mode="markers",
            # a sixth kind has the first one's color, and another shape
            marker=role.marker(8, symbol=ROLES[(number + 2 * (number // len(ROLES))) % len(ROLES)].symbol),
            name=kind,
            hovertext=[_told(row) for row in mine],
            hoverinfo="text",
            xaxis="x2",
            yaxis="y2",
        )
    top = max(0.05, 1.1 * max(row.error for row in rows))
    figure.update_layout(
        xaxis={"domain": LEFT, "title": {"text": "block"}, "tickvals": layers},
        yaxis={"title": {"text": "million parameters"}, "rangemode": "tozero"},
        xaxis2={"domain": RIGHT, "title": {"text": "block"}, "anchor": "y2", "tickvals": layers,
                "range": (layers[0] - 0.6, layers[-1] + 0.6)},
        yaxis2={"anchor": "x2", "title": {"text": "relative error"}, "range": (-0.03 * top, top)},
        legend={"orientation": "h", "x": 0, "y": -0.24, "yanchor": "top"},
    )  # fmt: skip
    panel_title(figure, 0, "<b>parameters</b>")
    panel_title(figure, 1, "<b>predicted error of each weight</b>")
    worst = max(rows, key=lambda row: row.error)
    cut = [row for row in rows if row.rank is not None]
    told = f"{before:,} → {after:,} parameters, {after / before:.1%} kept; {len(cut)} of {len(rows)} weights are pairs"
    if cut:
        told += f"; the largest predicted error is {worst.error:.3f}, {worst.module}"
    return Figure(figure, f"{told}.")


def layer_prices(
    prices: Mapping[int, float],
    gone: Collection[int] = (),
    together: float | None = None,
    unit: str = "KL to the teacher, nats",
    limit: float = 0.0,
    title: str = "What each layer is worth",
) -> Figure:
    """A bar for each layer, as long as what leaving it out alone costs; those that are gone are hatched.

    Args:
        prices: {layer: cost of leaving it out alone}, as `fakit.compression.importance.importance` gives them.
        gone: layers that are left out now.
        together: what leaving all of these out costs; drawn beside the sum of their single prices.
        unit: of the cost, on the axis.
        limit: upper end of the axis, so that pictures after each other compare; never below the data.

    Raises:
        ValueError: no prices, a layer that has none, or a number that is not finite.
    """
    check_keys(prices, "layer_prices")
    if unknown := sorted(set(gone) - set(prices)):
        raise ValueError(
            f"layer_prices: layer {unknown[0]} is gone and has no price; priced are {', '.join(map(str, prices))}"
        )
    if wrong := [i for i, price in prices.items() if not np.isfinite(price)]:
        raise ValueError(f"layer_prices: the price of layer {wrong[0]} is not finite")
    layers, gone = sorted(prices), sorted(set(gone))
    figure = canvas(title, (720, 380), {"l": 72, "t": 76}, barmode="overlay")
    bars = [
        ("stays", [(i, prices[i]) for i in layers if i not in gone], {"color": TEACHER.color}),
        ("left out", [(i, prices[i]) for i in gone],
         {"color": GRID, "pattern": {"shape": "/", "fgcolor": BASELINE.color, "size": 6}}),
    ]  # fmt: skip
    alone, right = sum(prices[i] for i in gone), layers[-1] + 1.5
    if gone and together is not None:
        bars.append(("sum of single prices", [(right, alone)], {"color": EXTRA.color}))
        bars.append(("together", [(right + 1, together)], {"color": ALIGNED.color}))
    for name, mine, look in bars:
        if mine:
            places, heights = zip(*mine, strict=True)
            figure.add_bar(
                x=places,
                y=heights,
                width=0.7,
                marker=look,
                name=name,
                hovertext=[f"{f'layer {i}, ' if i in prices else ''}{name}: {price:.4g}" for i, price in mine],
                hoverinfo="text",
            )
    numbers = [price for _, mine, _ in bars for _, price in mine]
    top, bottom = 1.08 * max(0.0, limit, *numbers), 1.08 * min(0.0, *numbers)
    step = -(-len(layers) // 20)
    figure.update_xaxes(title="layer left out", tickvals=layers[::step], range=(layers[0] - 0.7, right + 1.6))
    figure.update_yaxes(title=unit, range=(bottom, top or 1.0))
    cheapest = min((i for i in layers if i not in gone), key=prices.get, default=None)
    if not gone:
        return Figure(figure, f"Alone, layer {cheapest} is the cheapest: {prices[cheapest]:.4g} ({unit}).")
    listed = ", ".join(map(str, gone))
    told = f"Without layer{'s' * (len(gone) > 1)} {listed}: single prices sum to {alone:.4g}"
    return Figure(figure, told + ("." if together is None else f", together they cost {together:.4g} ({unit})."))


def _kind(module: str) -> str:
    """What a weight is in its block: its name after the block's number."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module


def _told(row: Any) -> str:
    rank = "dense" if row.rank is None else f"rank {row.rank}"
    return f"{row.module}: {rank}, error {row.error:.3f}, stable rank {row.stable_rank_weights:.1f}"
