"""Traces of the static twin: how plotly's scatter, bar and heatmap are drawn by matplotlib."""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fakit.figures.theme import FONT_SIZE, SMALL, TEXT

PT = 0.75  # pt per px
DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2.5)),
    "dot": (0, (1.2, 2)),
    "dashdot": (0, (6, 2, 1.2, 2)),
    "longdash": (0, (9, 3)),
}
SYMBOLS = {
    "circle": "o",
    "diamond": "D",
    "square": "s",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "line-ns": "|",
    "line-ew": "_",
}
HATCHES = {"": "", "/": "///", "\\": "\\\\\\", "x": "xx", ".": "..", "-": "---", "|": "|||", "+": "++"}
Rgba = tuple[float, float, float, float]


class Drawing(Protocol):
    """What a trace is drawn into: the figure's layout, size (px) and canvas, and where its coordinates lie."""

    canvas: Any
    layout: Any
    traces: list[Any]
    width: float
    height: float

    def position(self, axis_id: str, values: Any) -> np.ndarray: ...

    def paper(self, x: float, y: float) -> tuple[float, float]: ...


def plain(text: str) -> str:
    """plotly's HTML subset as plain text."""
    return re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>", "\n", str(text))).replace("&lt;", "<").replace("&amp;", "&")


def rgba(color: str) -> Rgba:
    """A CSS color (`#rrggbb`, a name, `rgb(…)`, `rgba(…)`) as four floats."""
    match = re.fullmatch(r"rgba?\(([^)]*)\)", color.replace(" ", ""))
    if match is None:
        return to_rgba(color)
    red, green, blue, *alpha = (float(part) for part in match[1].split(","))
    return red / 255, green / 255, blue / 255, alpha[0] if alpha else 1.0


def color_map(scale: Any) -> LinearSegmentedColormap:
    """A plotly colorscale, [[position, color], …], as a matplotlib color map; NaN is transparent."""
    return LinearSegmentedColormap.from_list(
        "scale", [(stop, rgba(color)) for stop, color in scale], N=512
    ).with_extremes(bad=(0, 0, 0, 0))


def draw_trace(twin: Drawing, trace: Any, axes: Any) -> None:
    """Draw one trace on its axes."""
    if trace.type == "bar":
        _bar(twin, trace, axes)
    elif trace.type == "heatmap":
        _heatmap(twin, trace, axes)
    else:
        _scatter(twin, trace, axes)


def handle(trace: Any) -> Any:
    """The legend's sample of a trace."""
    if trace.type == "bar":
        face = trace.marker.color if isinstance(trace.marker.color, str) else TEXT
        hatch = HATCHES[trace.marker.pattern.shape or ""]
        return Patch(facecolor=rgba(face), edgecolor="white" if hatch else rgba(face), hatch=hatch, linewidth=0)
    if trace.fill == "toself":
        return Patch(facecolor=rgba(trace.fillcolor), linewidth=0)
    mode = trace.mode or "lines"
    color = trace.line.color if "lines" in mode else trace.marker.color
    color = rgba(color) if isinstance(color, str) else rgba(TEXT)
    symbol = trace.marker.symbol or "circle"
    symbol = (symbol if isinstance(symbol, str) else symbol[0]).removesuffix("-open")
    return Line2D(
        [],
        [],
        color=color,
        linestyle=DASHES[trace.line.dash or "solid"] if "lines" in mode else "none",
        linewidth=(trace.line.width or 2) * PT,
        marker=SYMBOLS[symbol] if "markers" in mode else "none",
        markersize=7 * PT,
    )


# ---- scatter -------------------------------------------------------------------------------------------------------


def _scatter(twin: Drawing, trace: Any, axes: Any) -> None:
    x, y = twin.position(trace.xaxis or "x", trace.x), twin.position(trace.yaxis or "y", trace.y)
    mode, alpha = trace.mode or "lines", trace.opacity
    if trace.fill not in (None, "none", "toself"):
        raise ValueError(
            f"the static twin fills with 'toself' (a closed band); trace {trace.name!r} has {trace.fill!r}"
        )
    if trace.fill == "toself":
        axes.fill(x, y, facecolor=rgba(trace.fillcolor), edgecolor="none", zorder=1.5, alpha=alpha)
    if "lines" in mode and trace.line.width != 0:
        axes.plot(
            x,
            y,
            color=rgba(trace.line.color or TEXT),
            linestyle=DASHES[trace.line.dash or "solid"],
            linewidth=(trace.line.width or 2) * PT,
            drawstyle={"hv": "steps-post", "vh": "steps-pre"}.get(trace.line.shape, "default"),
            alpha=alpha,
            zorder=2,
        )
    for name, error in (("xerr", trace.error_x), ("yerr", trace.error_y)):
        if error.array is not None and error.visible is not False:
            above = np.asarray(error.array, float)
            below = above if error.arrayminus is None else np.asarray(error.arrayminus, float)
            width = (error.thickness or 2) * PT
            cap = (4 if error.width is None else error.width) * PT
            style = {"ecolor": rgba(error.color or TEXT), "elinewidth": width, "capthick": width, "capsize": cap}
            axes.errorbar(x, y, fmt="none", zorder=2.2, **{name: np.nan_to_num(np.stack([below, above]))}, **style)
    if "markers" in mode:
        _markers(trace, axes, x, y)
    if "text" in mode:
        _labels(trace, axes, x, y)


def _markers(trace: Any, axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    marker = trace.marker
    color = marker.color if marker.color is not None else TEXT
    colors = [rgba(color)] * len(x) if isinstance(color, str) else [rgba(each) for each in color]
    size = 6 if marker.size is None else marker.size
    sizes = np.broadcast_to(np.asarray(size, float), x.shape)
    symbol = marker.symbol or "circle"
    symbols = [symbol] * len(x) if isinstance(symbol, str) else list(symbol)
    opacity = marker.opacity if marker.opacity is not None else trace.opacity
    edge, width = marker.line.color, marker.line.width or 0
    for kind in dict.fromkeys(symbols):
        rows = [i for i, name in enumerate(symbols) if name == kind]
        shape, is_open = kind.removesuffix("-open"), kind.endswith("-open")
        own = [colors[i] for i in rows]
        edges = own if is_open else rgba(edge) if edge and width else "face"
        axes.scatter(
            x[rows],
            y[rows],
            s=(sizes[rows] * PT) ** 2 * (0.8 if shape == "diamond" else 1.0),
            c="none" if is_open else own,
            marker=SYMBOLS[shape],
            alpha=opacity,
            # a mark that is a line has no edge, and matplotlib warns of one
            **({} if kind.startswith("line") else {"edgecolors": edges}),
            linewidths=width * PT if width else 1.5 * PT if kind.startswith("line") else 0,
            zorder=3,
        )


def _labels(trace: Any, axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    place = trace.textposition or "middle center"
    places = [place] * len(x) if isinstance(place, str) else list(place)
    texts = [trace.text] * len(x) if isinstance(trace.text, str) else trace.text
    size = trace.marker.size if isinstance(trace.marker.size, (int, float)) and "markers" in trace.mode else 0
    gap = (size / 2 + 4) * PT
    color = trace.textfont.color or TEXT
    colors = [color] * len(x) if isinstance(color, str) else list(color)
    family = "DejaVu Sans Mono" if "mono" in (trace.textfont.family or "").lower() else None
    for i, text in enumerate(texts):
        vertical, horizontal = places[i].split()
        shift_x = {"left": -gap, "right": gap, "center": 0}[horizontal] * (0.9 if vertical == "middle" else 0.5)
        axes.annotate(
            plain(text),
            (x[i], y[i]),
            xytext=(shift_x, {"top": gap, "bottom": -gap, "middle": 0}[vertical]),
            textcoords="offset points",
            ha={"left": "right", "right": "left", "center": "center"}[horizontal],
            va={"top": "bottom", "bottom": "top", "middle": "center_baseline"}[vertical],
            color=rgba(colors[i]),
            fontsize=(trace.textfont.size or SMALL) * PT,
            fontfamily=family,
            zorder=4,
        )


# ---- bar -----------------------------------------------------------------------------------------------------------


def _bar(twin: Drawing, trace: Any, axes: Any) -> None:
    across = trace.orientation == "h"
    places, lengths = (trace.y, trace.x) if across else (trace.x, trace.y)
    axis_ids = (trace.yaxis or "y", trace.xaxis or "x") if across else (trace.xaxis or "x", trace.yaxis or "y")
    center, length = twin.position(axis_ids[0], places), twin.position(axis_ids[1], lengths)
    mates = [t for t in twin.traces if t.type == "bar" and (t.xaxis, t.yaxis) == (trace.xaxis, trace.yaxis)]
    step = np.diff(np.unique(center)).min() if len(np.unique(center)) > 1 else 1.0
    gap = 0.2 if twin.layout.bargap is None else twin.layout.bargap
    width, base = step * (1 - gap), np.zeros_like(length)
    mode = twin.layout.barmode or "group"
    number = next(i for i, mate in enumerate(mates) if mate is trace)
    if mode == "group":
        width = width / len(mates)
        center = center + (number - (len(mates) - 1) / 2) * width
    elif mode == "stack":
        for mate in mates[:number]:
            below = dict(zip(mate.y if across else mate.x, mate.x if across else mate.y, strict=True))
            base = base + np.array([below.get(place, 0.0) or 0.0 for place in places])
    if trace.width is not None:
        width = trace.width
    color = trace.marker.color or TEXT
    faces = [rgba(color)] * len(center) if isinstance(color, str) else [rgba(each) for each in color]
    inner = width * 0.96
    draw = axes.barh if across else axes.bar
    start = {"left" if across else "bottom": base}
    draw(center, length, inner, color=faces, linewidth=0, zorder=2, alpha=trace.opacity, **start)
    if hatch := HATCHES[trace.marker.pattern.shape or ""]:
        draw(center, length, inner, color="none", edgecolor="white", linewidth=0, hatch=hatch, zorder=2.1, **start)
    error = trace.error_x if across else trace.error_y
    if error.array is not None:
        above = np.asarray(error.array, float)
        spread = np.stack([above if error.arrayminus is None else np.asarray(error.arrayminus, float), above])
        ends = (base + length, center) if across else (center, base + length)
        name = "xerr" if across else "yerr"
        style = {"ecolor": rgba(error.color or TEXT), "elinewidth": 1.5 * PT, "capthick": 1.5 * PT, "capsize": 3 * PT}
        axes.errorbar(*ends, fmt="none", zorder=3, **{name: spread}, **style)
    if trace.text is not None:
        _bar_text(trace, axes, center, base, length, across)


def _bar_text(trace: Any, axes: Any, center: np.ndarray, base: np.ndarray, length: np.ndarray, across: bool) -> None:
    outside = trace.textposition == "outside"
    for i, text in enumerate(trace.text):
        point = base[i] + (length[i] if outside else length[i] / 2)
        shift = 4 * PT if outside else 0
        axes.annotate(
            plain(text),
            (point, center[i]) if across else (center[i], point),
            xytext=(shift, 0) if across else (0, shift),
            textcoords="offset points",
            ha="left" if across and outside else "center",
            va="bottom" if outside and not across else "center",
            color=rgba(trace.textfont.color or (TEXT if outside else "#FFFFFF")),
            fontsize=(trace.textfont.size or SMALL) * PT,
            zorder=4,
        )


# ---- heatmap -------------------------------------------------------------------------------------------------------


def _heatmap(twin: Drawing, trace: Any, axes: Any) -> None:
    values = np.array([[np.nan if v is None else v for v in row] for row in trace.z], float)
    rows, columns = values.shape
    x = np.arange(columns) if trace.x is None else twin.position(trace.xaxis or "x", trace.x)
    y = np.arange(rows) if trace.y is None else twin.position(trace.yaxis or "y", trace.y)
    if trace.colorscale is None or trace.zmin is None or trace.zmax is None:
        raise ValueError(
            "a heatmap of the kit fixes its colorscale, zmin and zmax; found one that leaves them to plotly"
        )
    palette, norm = color_map(trace.colorscale), Normalize(trace.zmin, trace.zmax)
    for name, centers in (("x", x), ("y", y)):
        if len(centers) > 2 and np.ptp(np.diff(centers)) > 1e-6:
            raise ValueError(
                f"the static twin draws heatmaps of equal cells; the {name} of this one are unevenly spaced"
            )
    half_x = (x[1] - x[0]) / 2 if columns > 1 else 0.5
    half_y = (y[1] - y[0]) / 2 if rows > 1 else 0.5
    extent = (x[0] - half_x, x[-1] + half_x, y[0] - half_y, y[-1] + half_y)
    style = {
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "none",
        "zorder": 1,
    }  # one image: no seams between cells
    axes.imshow(np.ma.masked_invalid(values), extent=extent, cmap=palette, norm=norm, **style)
    if trace.text is not None:
        size = (trace.textfont.size or SMALL) * PT
        for i, j in np.ndindex(rows, columns):
            red, green, blue, alpha = palette(norm(values[i, j])) if np.isfinite(values[i, j]) else (0, 0, 0, 0)
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            ink = TEXT if alpha == 0 else "#000000" if light else "#FFFFFF"
            axes.text(x[j], y[i], plain(trace.text[i][j]), ha="center", va="center", color=ink, fontsize=size, zorder=4)
    if trace.showscale is not False:
        _color_bar(twin, trace.colorbar, ScalarMappable(norm, palette))


def _color_bar(twin: Drawing, source: Any, scale: ScalarMappable) -> None:
    """A color bar where plotly puts it: x, y in paper coordinates, length a fraction, thickness in px."""
    across = source.orientation == "h"
    thickness, length = source.thickness or 14, 1.0 if source.len is None else source.len
    if across:
        left, top = twin.paper(source.x - length / 2, source.y)
        right, _ = twin.paper(source.x + length / 2, source.y)
        box = (left, top - thickness / twin.height, right - left, thickness / twin.height)
    else:
        left, bottom = twin.paper(source.x, source.y - length / 2)
        _, top = twin.paper(source.x, source.y + length / 2)
        box = (left, bottom, thickness / twin.width, top - bottom)
    holder = twin.canvas.add_axes(box)
    bar = twin.canvas.colorbar(scale, cax=holder, orientation="horizontal" if across else "vertical")
    bar.outline.set_visible(False)
    if source.tickvals is not None:
        bar.set_ticks(
            [float(v) for v in source.tickvals], labels=[plain(t) for t in source.ticktext or source.tickvals]
        )
    bar.ax.tick_params(color=TEXT, labelcolor=TEXT, labelsize=SMALL * PT, length=4 * PT, width=0.75)
    bar.ax.minorticks_off()
    if source.title.text:
        bar.set_label(plain(source.title.text), color=TEXT, fontsize=FONT_SIZE * PT)
