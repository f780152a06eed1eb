"""Rogue dimensions under a slider: similarity and variance against how many of them lost their say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fakit.figures.drawing import axis_id, canvas, check_keys, note, panel_title, panels
from fakit.figures.figure import Figure
from fakit.figures.similarity_steps import pair_role
from fakit.figures.theme import SMALL, TEXT, Role, model_role
from fakit.figures.ticks import thinned


def rogue_scrub(
    cka: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[float]],
    k: int,
    mode: str = "drop",
    title: str = "Without the largest dimensions",
) -> Figure:
    """Two panels over the number of dimensions taken care of: CKA of pairs of layers,
    and the variance these dimensions carry.

    A layer has the color of its pair, and the teacher's line is solid, the student's dashed;
    its name stands at its end.

    Args:
        cka: name of a pair ("S3 and T6"), in the order of the map → (K + 1,), CKA with 0 … K dimensions dropped or
            z-scored; NaN is a gap.
        shares: layer (T6, S3 …) → (K + 1,), the variance share of its 0 … K largest dimensions.
        k: where one stands, 0 … K; marked by a line.
        mode: what was done to them, "drop" or "z-score".
        title: short title.

    Raises:
        ValueError: nothing to draw, arrays of other lengths than each other, or a k beyond them.
    """
    check_keys(cka, "rogue_scrub: cka")
    check_keys(shares, "rogue_scrub: shares")
    lengths = {len(line) for line in (*cka.values(), *shares.values())}
    if len(lengths) > 1 or not 0 <= k < max(lengths):
        raise ValueError(
            f"rogue_scrub draws lines of one length that reach k; found lengths {sorted(lengths)} and k = {k}"
        )
    steps = list(range(max(lengths)))
    done = {"drop": "dropped", "z-score": "z-scored"}.get(mode, mode)
    top = max(20.0, 115 * max(max(line) for line in shares.values()))
    figure = canvas(title, (820, 400), {"t": 100, "b": 60}, legend={"y": 1.08})
    left, right = panels(2, 0.1)
    figure.update_layout(
        xaxis={"domain": left, "anchor": "y"},
        xaxis2={"domain": right, "anchor": "y2"},
        yaxis={"anchor": "x", "title": {"text": "CKA"}, "range": (1.1 * min(0, *map(_least, cka.values())), 1.02)},
        yaxis2={"anchor": "x2", "title": {"text": "share of variance (%)"}, "range": (0, top)},
    )  # fmt: skip
    for position, (name, line) in enumerate(cka.items()):
        role = pair_role(position)
        hover = f"{name}<br>%{{x}} {done}: CKA %{{y:.3f}}<extra></extra>"
        look = {"mode": "lines+markers", "line": role.line(), "marker": role.marker(7)}
        figure.add_scatter(x=steps, y=list(line), name=name, hovertemplate=hover, **look)
    ends = _apart({name: 100 * line[-1] for name, line in shares.items()}, 0.06 * top)
    for name, line in shares.items():
        role = _layer_role(name, list(cka))
        figure.add_scatter(
            x=steps,
            y=[100 * share for share in line],
            name=name,
            mode="lines+markers",
            showlegend=False,
            line=role.line(1.6),
            marker=role.marker(6),
            hovertemplate=f"{name}<br>the largest %{{x}}: %{{y:.1f}} % of the variance<extra></extra>",
            xaxis="x2",
            yaxis="y2",
        )
        font = {"size": SMALL, "color": role.color}
        note(figure, name, steps[-1], ends[name], xref="x2", yref="y2", xanchor="left", xshift=8, font=font)
    for number, heading in enumerate(("similarity", "variance carried by them")):
        x, y = axis_id("x", number), f"{axis_id('y', number)} domain"
        line = {"color": TEXT, "width": 2, "dash": "dot"}
        figure.add_shape(type="line", x0=k, x1=k, y0=0, y1=1, xref=x, yref=y, line=line)
        panel_title(figure, number, heading)
    ticks = thinned(steps, 12)
    figure.update_xaxes(title=f"largest dimensions {done}", range=(-0.3, steps[-1] + 0.3))
    figure.update_xaxes(tickvals=ticks, ticktext=[str(k) for k in ticks])
    figure.update_layout(xaxis2={"range": (-0.3, 1.1 * steps[-1] + 0.3)})  # room for the names
    said = [
        f"{name} {line[0]:.2f} → {line[k]:.2f}" for name, line in cka.items() if np.isfinite([line[0], line[k]]).all()
    ]
    worst = max(shares, key=lambda name: shares[name][k])
    summary = f"With the {k} largest dimensions of each layer {done}: CKA {', '.join(said) or 'undefined'}; "
    caption = "Right: each layer in the color of its pair, the teacher's line solid, the student's dashed."
    return Figure(figure, summary + f"in {worst} they carry {100 * shares[worst][k]:.1f} % of the variance.", caption)


def _layer_role(name: str, pairs: Sequence[str]) -> Role:
    """Color of the first pair that the layer is in, dash and marker of its model; a layer of no pair is its model's."""
    model = model_role(name)
    found = [position for position, pair in enumerate(pairs) if name in pair.split()]
    return replace(model, color=pair_role(found[0]).color) if found else model


def _apart(ends: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights for the names at the lines' ends, from the lowest up, at least `gap` apart."""
    placed: dict[str, float] = {}
    for name in sorted(ends, key=ends.get):
        placed[name] = max(ends[name], max(placed.values(), default=-gap) + gap)
    return placed


def _least(line: Sequence[float]) -> float:
    finite = [value for value in line if np.isfinite(value)]
    return min(finite, default=0.0)
