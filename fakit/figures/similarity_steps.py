"""Similarity over training steps: one line a pair of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fakit.figures.drawing import canvas, check_keys
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, Role

_KINDS = (ALIGNED, EXTRA, BASELINE)  # neither the teacher's nor the student's color: a pair is both
_AGAIN = (("solid", "circle"), ("dash", "x"), ("longdashdot", "star"))  # the same colors, drawn otherwise


def pair_role(position: int) -> Role:
    """How the `position`-th pair of a layer map is drawn, in every figure that draws pairs; six differ,
    then they come again.
    """
    turn, kind = divmod(position, len(_KINDS))
    role = _KINDS[kind]
    dash, symbol = (role.dash, role.symbol) if turn % 2 == 0 else _AGAIN[kind]
    return replace(role, name=f"pair {position}", dash=dash, symbol=symbol)


def similarity_over_steps(
    steps: Sequence[int],
    values: Mapping[str, Sequence[float]],
    title: str = "The student's CKA to its teacher while it trains",
    measure: str = "CKA",
) -> Figure:
    """CKA of pairs of layers against optimizer steps, always from 0 to 1.

    Args:
        steps: when it was measured, (N,), rising.
        values: name of a pair ("S1 and T2") → (N,), in the order of the map; NaN is a gap.
        title: short title.
        measure: the name of what is shown.

    Raises:
        ValueError: nothing to draw, steps that do not rise, or a pair with another number of values.
    """
    check_keys(values, "similarity_over_steps")
    if not len(steps) or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"similarity_over_steps draws over rising steps; found {list(steps)}")
    figure = canvas(title, margin={"t": 96})
    said, low = [], 0.0
    for position, (name, line) in enumerate(values.items()):
        line = np.asarray(line, float)
        if line.shape != (len(steps),):
            raise ValueError(f"{name} has {len(line)} values at {len(steps)} steps: give one a step")
        role = pair_role(position)
        figure.add_scatter(
            x=list(steps),
            y=line,
            mode="lines+markers",
            name=name,
            line=role.line(),
            marker=role.marker(8),
            hovertemplate=f"{name}<br>step %{{x}}: {measure} %{{y:.3f}}<extra></extra>",
        )
        finite = line[np.isfinite(line)]
        low = min([low, *finite])
        said.append(f"{name} {finite[0]:.2f} → {finite[-1]:.2f}" if len(finite) else f"{name} undefined")
    figure.update_xaxes(title="optimizer steps", range=(min(0, steps[0]), steps[-1] * 1.02 or 1))
    figure.update_yaxes(title=measure, range=(1.1 * low, 1.02))
    return Figure(figure, f"{measure} from step {steps[0]} to step {steps[-1]}: {', '.join(said)}.")
