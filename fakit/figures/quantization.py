"""What quantizing a teacher does to its hidden states and its attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fakit.figures.drawing import axis_id, axis_key, canvas, check_keys, log_axis, panel_title, panels, records
from fakit.figures.figure import Figure
from fakit.figures.theme import BASELINE, PAIR, ROLES, STUDENT, TEACHER, Role
from fakit.figures.ticks import thinned

MEASURES = (  # column, panel heading, axis title, short name
    ("relative_error", "hidden states", "relative error ‖Ĥ − H‖ / ‖H‖", "relative error"),
    ("attention_jsd", "attention maps", "Jensen–Shannon divergence (nats)", "attention JSD"),
)


def quantization_by_layer(
    forms: Mapping[str, Any],
    references: Mapping[str, Mapping[int, float]] | None = None,
    letter: str = "T",
    title: str = "What quantizing does, layer by layer",
) -> Figure:
    """One line a form of the teacher: the error of its hidden states,
    and beside it the divergence of its attention maps.

    Args:
        forms: name (8bit, 4bit …) → one row a layer: layer (0 = embeddings), relative_error, attention_jsd in nats
            (None where there is none); `QuantizationFidelity.rows()` gives them.
        references: name → teacher layer → relative error: what the errors are to be judged by, such as a student's
            distance to the full teacher. Drawn dotted among the hidden states.
        letter: of the layers' names: T0, T1 …
        title: short title.

    Both axes are logarithmic; an exact 0 has no place there, and the caption names its layer.

    Raises:
        ValueError: nothing to draw, rows without these columns, or forms with different layers.
    """
    check_keys(forms, "quantization_by_layer")
    columns = ("layer", *(column for column, *_ in MEASURES))
    lines = {name: records(table, columns, "quantization_by_layer") for name, table in forms.items()}
    layers = {name: [int(row["layer"]) for row in rows] for name, rows in lines.items()}
    shown = next(iter(layers.values()))
    if any(found != shown for found in layers.values()):
        raise ValueError(f"every form needs a row for the same layers; found {layers}")

    styles = {name: ROLES[(3, 4, 0)[position % 3]] for position, name in enumerate(lines)}
    figure = canvas(title, PAIR, {"t": 104})
    parts = []
    for number, ((column, heading, axis_title, short), domain) in enumerate(
        zip(MEASURES, panels(2, 0.15), strict=True)
    ):
        values = {name: _column(rows, column) for name, rows in lines.items()}
        for name, errors in values.items():
            _line(figure, number, name, shown, errors, styles[name], letter, short)
        drawn = [error for errors in values.values() for error in errors]
        if number == 0:
            for place, (name, by_layer) in enumerate((references or {}).items()):
                role = (BASELINE, STUDENT, TEACHER)[place % 3]
                _line(figure, 0, name, list(by_layer), np.array(list(by_layer.values()), float), role, letter, short)
                drawn += by_layer.values()
        ticks = thinned(shown, 12)
        figure.update_layout(
            {
                axis_key("x", number): {
                    "domain": domain,
                    "anchor": axis_id("y", number),
                    "range": (min(shown) - 0.4, max(shown) + 0.4),
                    "tickvals": ticks,
                    "ticktext": [f"{letter}{layer}" for layer in ticks],
                    "title": {"text": "layer"},
                },
                axis_key("y", number): {
                    "anchor": axis_id("x", number),
                    "title": {"text": axis_title},
                    **log_axis(drawn),
                },
            }
        )
        panel_title(figure, number, heading)
        parts.append(_sentence(short, values, shown, letter))
    figure.update_layout(legend={"y": 1.09})
    for name, by_layer in (references or {}).items():
        listed = ", ".join(f"{value:.2g} at {letter}{layer}" for layer, value in by_layer.items())
        parts.append(f"{name}: {listed}")
    exact = [
        f"{letter}{layer}"
        for place, layer in enumerate(shown)
        if all(rows[place]["relative_error"] == 0 for rows in lines.values())
    ]
    caption = f"Exact, and so not on the axis: hidden states of {', '.join(exact)}." if exact else ""
    text = "; ".join(parts)
    return Figure(figure, f"{text[0].upper()}{text[1:]}.", caption)


def _column(rows: list[dict], column: str) -> np.ndarray:
    return np.array([np.nan if row[column] is None else row[column] for row in rows], float)


def _line(figure, number: int, name: str, layers: list[int], values: np.ndarray, role: Role, letter: str, short: str):
    figure.add_scatter(
        x=layers,
        y=np.where(values > 0, values, np.nan),  # a logarithmic axis has no 0
        mode="lines+markers",
        name=name,
        line=role.line(),
        marker=role.marker(8),
        customdata=[f"{letter}{layer}" for layer in layers],
        hovertemplate=f"{name}, %{{customdata}}: {short} %{{y:.3g}}<extra></extra>",
        showlegend=number == 0,
        xaxis=axis_id("x", number),
        yaxis=axis_id("y", number),
    )


def _sentence(short: str, values: Mapping[str, np.ndarray], layers: list[int], letter: str) -> str:
    """`relative error 8bit 0.02 (T1) to 0.05 (T6), 4bit …`:
    the smallest and the largest above 0 where there are any.
    """
    parts = []
    for name, errors in values.items():
        places = [place for place, error in enumerate(errors) if error > 0]
        if not places:
            parts.append(f"{name} 0 throughout" if np.isfinite(errors).any() else f"{name} not measured")
            continue
        low, high = (edge(places, key=lambda place: errors[place]) for edge in (min, max))
        at = " to ".join(f"{errors[place]:.2g} ({letter}{layers[place]})" for place in dict.fromkeys((low, high)))
        parts.append(f"{name} {at}")
    return f"{short} {', '.join(parts)}"
