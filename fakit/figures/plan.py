"""Memory of a planned training step, by part, against what cards have."""

from __future__ import annotations

from collections.abc import Mapping

from fakit.figures.drawing import canvas, check_keys, distinct, label_width, note
from fakit.figures.figure import Figure
from fakit.figures.theme import ALIGNED, BASELINE, EXTRA, SMALL, STUDENT, TEACHER, TEXT, pattern

GB = 1e9
# The color says whose it is, the pattern what it is.
STYLES = {
    "teacher weights": (TEACHER.color, ""),
    "teacher activations": (TEACHER.color, "/"),
    "captured traces": (TEACHER.color, "."),
    "student weights": (STUDENT.color, ""),
    "student activations": (STUDENT.color, "/"),
    "gradients": (STUDENT.color, "x"),
    "optimizer state": (EXTRA.color, "\\"),
    "losses": (ALIGNED.color, "+"),
    "overhead": (BASELINE.color, "-"),
}


def memory_plan(
    setups: Mapping[str, Mapping[str, float]],
    limit: float,
    limit_name: str,
    cards: Mapping[str, float] | None = None,
    title: str = "Memory at the peak of a step",
) -> Figure:
    """One stacked bar a set-up, by part, and lines at what cards hold.

    Args:
        setups: set-up → part (a key of `STYLES`) → bytes.
        limit: bytes of the card asked about; a dashed line.
        limit_name: its name.
        cards: other cards → bytes; dotted lines where they lie within the picture.
        title: short title.

    Raises:
        ValueError: nothing to draw, or a part that has no style.
    """
    check_keys(setups, "memory_plan")
    kinds = distinct(part for sizes in setups.values() for part in sizes)
    if unknown := [kind for kind in kinds if kind not in STYLES]:
        raise ValueError(f"memory_plan: no style for {', '.join(unknown)}; the parts are {', '.join(STYLES)}")
    kinds = [kind for kind in STYLES if kind in kinds]
    totals = {name: float(sum(sizes.values())) for name, sizes in setups.items()}
    top = max(*totals.values(), limit)
    names, side = list(setups)[::-1], label_width(setups) + 16
    plot = 44 * len(setups) + 18
    above = 66 + 20 * -(-len(kinds) // 2)  # the legend stands in two columns
    figure = canvas(
        title, (760, above + plot + 56), {"l": side, "t": above, "r": 92, "b": 56}, barmode="stack", bargap=0.35
    )
    for kind in kinds:
        color, shape = STYLES[kind]
        figure.add_bar(
            y=names,
            x=[setups[name].get(kind, 0.0) / GB for name in names],
            orientation="h",
            name=kind,
            marker={"color": color, "pattern": pattern(shape, color), "line": {"width": 0}},
            hovertemplate=f"%{{y}}, {kind}: %{{x:.3g}} GB<extra></extra>",
        )
    for place, name in enumerate(names):  # in a column of their own, where no line runs through them
        total, letters = f"{totals[name] / GB:.3g} GB", {"size": SMALL, "color": TEXT}
        note(figure, total, 1, place, xref="x domain", xanchor="left", xshift=8, font=letters)
    lines = [(size, name, "dot", 1.2) for name, size in _spread(cards or {}, limit, top)]
    for size, name, dash, width in [*lines, (limit, limit_name, "dash", 2.4)]:
        line = {"color": TEXT, "width": width, "dash": dash}
        figure.add_shape(type="line", x0=size / GB, x1=size / GB, y0=0, y1=1, yref="y domain", line=line)
        note(
            figure, name, size / GB, 1, yref="y domain", yanchor="bottom", yshift=2, font={"size": SMALL, "color": TEXT}
        )
    figure.update_layout(legend={"y": 1 + 22 / plot, "entrywidth": 180})
    figure.update_xaxes(range=(0, 1.04 * top / GB), title="memory (GB)").update_yaxes(type="category", showgrid=False)
    listed = ", ".join(
        f"{name} {total / GB:.3g} GB ({'fits' if total <= limit else 'does not fit'})" for name, total in totals.items()
    )
    return Figure(figure, f"Memory at the peak of a step, {limit_name} having {limit / GB:.3g} GB: {listed}.")


def _spread(cards: Mapping[str, float], limit: float, top: float) -> list[tuple[str, float]]:
    """Cards whose lines lie within the picture and not too near each other or the limit's:
    their labels would overlap.
    """
    shown: list[tuple[str, float]] = []
    taken = [limit]
    for name, size in sorted(cards.items(), key=lambda item: item[1]):
        if size <= 1.02 * top and all(abs(size - other) > 0.16 * top for other in taken):
            shown.append((name, size))
            taken.append(size)
    return shown
