"""The static twin: a plotly figure drawn again by matplotlib, as SVG with real text.

No browser and no kaleido: the subset of plotly that the kit's figures use is read from the figure object and drawn with
matplotlib's object API (never pyplot, so no global state and no leaking figures). The output is deterministic: no date,
and ids salted by the figure's own content, so that two pictures in one page do not share ids.

1 px is 1/96 inch in a browser and 0.75 pt in matplotlib; a picture is as large as its plotly figure.
"""

from __future__ import annotations

import hashlib
import io
import re
from html import escape
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from fakit.figures.static.traces import DASHES, PT, Rgba, draw_trace, handle, plain, rgba
from fakit.figures.theme import FONT_SIZE, GRID, LINES, SMALL, TEXT

_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE * PT,
    "axes.unicode_minus": True,
    "hatch.linewidth": 0.8,
    "path.simplify": False,
}
_KNOWN = ("scatter", "scattergl", "bar", "heatmap")


def to_svg(figure: go.Figure, description: str = "") -> str:
    """`figure` as an SVG document: `<title>`, `<desc>` (the description), real text, transparent background.

    Raises:
        ValueError: a trace type, shape or reference that the twin cannot draw; the message names it.
    """
    salt = hashlib.sha256(f"{figure.to_json()}{description}".encode()).hexdigest()[:12]
    with matplotlib.rc_context({**_RC, "svg.hashsalt": salt}):
        canvas = _draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _accessible(buffer.getvalue(), figure, description, salt)


def to_png(figure: go.Figure, scale: float = 2.0) -> bytes:
    """`figure` as a PNG, `scale` pixels per px of the figure, transparent background."""
    with matplotlib.rc_context(_RC):
        canvas = _draw(figure)
        canvas.set_dpi(96 * scale)
        buffer = io.BytesIO()
        FigureCanvasAgg(canvas).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _accessible(svg: str, figure: go.Figure, description: str, salt: str) -> str:
    """Cut the XML prologue and unused ids, set px sizes, and say what the picture shows."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[\w.-]+_\d+"', "", svg
    )  # matplotlib's group names: never referenced, and repeated in every figure
    head, body = svg.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    width, height = (float(part) / PT for part in size.groups())
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    title = plain(figure.layout.title.text or "Figure")
    return (
        f'{head} width="{width:g}" height="{height:g}" role="img" aria-labelledby="t{salt} d{salt}" '
        f'style="max-width:100%;height:auto">\n <title id="t{salt}">{escape(title)}</title>\n'
        f' <desc id="d{salt}">{escape(description)}</desc>{body}'
    )


def _draw(figure: go.Figure) -> Canvas:
    """Draw once; where a label leaves the canvas, widen that margin and draw again."""
    grow = np.zeros(4)
    for _ in range(3):
        twin = Twin(figure, grow)
        missing = twin.overflow()
        if (missing <= 1).all():
            break
        grow = grow + np.where(missing > 1, missing + 4, 0)
    return twin.canvas


class Twin:
    """One drawing of a plotly figure. `grow` (left, right, top, bottom) px is added to the margins.

    Attributes:
        canvas: the matplotlib figure.
        axes: matplotlib axes by (x axis id, y axis id), e.g. `("x2", "y")`.
        categories: labels of each categorical axis by axis id, in order.
    """

    def __init__(self, figure: go.Figure, grow: np.ndarray) -> None:
        for trace in figure.data:
            if trace.type not in _KNOWN:
                raise ValueError(
                    f"the static twin draws {', '.join(_KNOWN)} traces; found {trace.type!r} "
                    f"(trace {trace.name or 'without a name'}): use one of them, or show the plotly figure alone"
                )
        self.layout = figure.layout
        self.width = self._get("width") or LINES[0]
        self.height = self._get("height") or LINES[1]
        margin = {**{"l": 70, "r": 24, "t": 76, "b": 56}, **self.layout.margin.to_plotly_json()}
        left, right, top, bottom = np.array([margin["l"], margin["r"], margin["t"], margin["b"]]) + grow
        self.box = (left, bottom, self.width - left - right, self.height - top - bottom)  # px: x, y, width, height
        self.canvas = Canvas(figsize=(self.width / 96, self.height / 96), dpi=96, facecolor="none")
        FigureCanvasAgg(self.canvas)  # gives the figure a renderer to measure text with
        self.traces = [trace for trace in figure.data if trace.visible in (None, True)]
        self.axes: dict[tuple[str, str], Any] = {}
        self.categories: dict[str, list[str]] = {}
        self._collect_categories()
        for trace in self.traces:
            draw_trace(self, trace, self.axes_of(trace.xaxis or "x", trace.yaxis or "y"))
        self._finish_axes()
        self._shapes()
        self._annotations()
        self._title()
        self._legend()

    # ---- layout ----------------------------------------------------------------------------------------------------

    def _get(self, *path: str) -> Any:
        """A layout attribute, else the template's."""
        for root in (self.layout, self.layout.template.layout):
            value: Any = root
            for key in path:
                value = value[key] if value is not None else None
            if value is not None:
                return value
        return None

    def axis(self, axis_id: str) -> Any:
        """The plotly axis object of `"x2"`, `"y"` …"""
        return self.layout[f"{axis_id[0]}axis{axis_id[1:]}"]

    def paper(self, x: float, y: float) -> tuple[float, float]:
        """plotly's paper coordinates (the plot area) as a fraction of the canvas."""
        left, bottom, width, height = self.box
        return (left + x * width) / self.width, (bottom + y * height) / self.height

    def axes_of(self, x_id: str, y_id: str) -> Any:
        """The matplotlib axes of a pair of plotly axes, made on first use."""
        if (x_id, y_id) not in self.axes:
            for axis_id in (x_id, y_id):
                if self.axis(axis_id).overlaying:
                    raise ValueError(
                        f"the static twin draws no overlaying axes; {axis_id} overlays another: use a panel"
                    )
            (x0, x1), (y0, y1) = self.domain(x_id), self.domain(y_id)
            (left, bottom), (right, top) = self.paper(x0, y0), self.paper(x1, y1)
            made = self.canvas.add_axes((left, bottom, right - left, top - bottom), facecolor="none")
            for name, axis_id in (("x", x_id), ("y", y_id)):
                if self.axis(axis_id).type == "log":
                    getattr(made, f"set_{name}scale")("log")
            self.axes[x_id, y_id] = made
        return self.axes[x_id, y_id]

    def domain(self, axis_id: str) -> tuple[float, float]:
        return tuple(self.axis(axis_id).domain or (0.0, 1.0))

    def _collect_categories(self) -> None:
        for trace in self.traces:
            for name in ("x", "y"):
                axis_id, values = trace[f"{name}axis"] or name, trace[name]
                if values is None or not any(isinstance(value, str) for value in values):
                    continue
                known = self.categories.setdefault(axis_id, list(self.axis(axis_id).categoryarray or ()))
                known.extend(value for value in dict.fromkeys(values) if value is not None and value not in known)

    def position(self, axis_id: str, values: Any) -> np.ndarray:
        """Data of an axis as floats: category labels become 0, 1, …; None becomes NaN."""
        known = self.categories.get(axis_id)
        if known is not None:
            return np.array(
                [known.index(v) if isinstance(v, str) else np.nan if v is None else v for v in values], float
            )
        return np.array([np.nan if v is None else v for v in values], float)

    def _finish_axes(self) -> None:
        for (x_id, y_id), axes in self.axes.items():
            for name, axis_id in (("x", x_id), ("y", y_id)):
                self._finish_axis(axes, name, axis_id)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            for side in ("left", "bottom"):
                axes.spines[side].set(color=TEXT, linewidth=0.75)
            hidden = [name for name, axis_id in (("x", x_id), ("y", y_id)) if self.axis(axis_id).visible is False]
            for name in hidden:
                getattr(axes, f"{name}axis").set_visible(False)
                axes.spines["bottom" if name == "x" else "left"].set_visible(False)
        self._match()

    def _finish_axis(self, axes: Any, name: str, axis_id: str) -> None:
        source, target = self.axis(axis_id), getattr(axes, f"{name}axis")
        limits, known = source.range, self.categories.get(axis_id)
        if limits is not None and None not in limits:
            edges = [10.0**edge for edge in limits] if source.type == "log" else limits
            getattr(axes, f"set_{name}lim")(*edges)
        elif known is not None:
            getattr(axes, f"set_{name}lim")(-0.5, len(known) - 0.5)
        elif source.rangemode == "tozero":
            low, high = getattr(axes, f"get_{name}lim")()
            getattr(axes, f"set_{name}lim")(min(low, 0) if axes.dataLim.min[int(name == "y")] < 0 else 0, high)
        if source.autorange == "reversed" and not target.get_inverted():
            target.set_inverted(True)
        target.set_tick_params(color=TEXT, labelcolor=TEXT, labelsize=SMALL * PT, length=4 * PT, width=0.75)
        ticks, labels = source.tickvals, source.ticktext
        if ticks is None and known is not None:
            ticks, labels = range(len(known)), known
        if ticks is not None:
            text = None if labels is None else [plain(label) for label in labels]
            target.set_ticks([float(tick) for tick in ticks], text)
            target.set_minor_locator(NullLocator())
        elif source.type == "log":
            target.set_major_formatter(lambda value, _: f"{value:g}")
            target.set_minor_locator(NullLocator())
        if source.tickangle:
            turned = {"rotation": -source.tickangle, "rotation_mode": "anchor", "ha": "right", "va": "center"}
            for label in target.get_ticklabels():
                label.set(**turned)
        if source.showticklabels is False:
            target.set_tick_params(labelleft=False, labelbottom=False)
        if source.ticks == "":
            target.set_tick_params(length=0)
        if source.showline is False:
            axes.spines["bottom" if name == "x" else "left"].set_visible(False)
        if source.showgrid is not False and known is None:
            target.grid(True, color=rgba(GRID), linewidth=0.75)
        low, high = sorted(getattr(axes, f"get_{name}lim")())
        wanted = source.zeroline is True or (name == "y" and source.zeroline is None)  # as the template has it
        if wanted and source.type != "log" and low < 0 < high and known is None:
            line = axes.axhline if name == "y" else axes.axvline
            line(0, color=TEXT, linewidth=0.75, zorder=0.9)
        if source.title.text:
            size = source.title.font.size or FONT_SIZE
            getattr(axes, f"set_{name}label")(plain(source.title.text), color=TEXT, fontsize=size * PT, labelpad=6 * PT)

    def _match(self) -> None:
        """Axes that share an id or `matches` another get one range."""
        for name in ("x", "y"):
            groups: dict[str, list[Any]] = {}
            for (x_id, y_id), axes in self.axes.items():
                axis_id = x_id if name == "x" else y_id
                groups.setdefault(self.axis(axis_id).matches or axis_id, []).append(axes)
            for group in groups.values():
                edges = np.array([getattr(axes, f"get_{name}lim")() for axes in group])
                if len(group) > 1 and (edges[:, 0] < edges[:, 1]).all():
                    for axes in group:
                        getattr(axes, f"set_{name}lim")(edges[:, 0].min(), edges[:, 1].max())

    # ---- what lies on top ------------------------------------------------------------------------------------------

    def _transform(self, x_ref: str, y_ref: str, shift: tuple[float, float] = (0, 0)) -> tuple[Any, Any, Any]:
        """(place x, place y, transform) for references such as `"x2"`, `"x2 domain"` and `"paper"`."""

        def of(ref: str, name: str) -> tuple[Any, Any]:
            pick = 0 if name == "x" else 1
            if ref == "paper" or ref.endswith(" domain"):
                low, high = (0.0, 1.0) if ref == "paper" else self.domain(ref.split()[0])

                def fraction(value: float) -> float:
                    point = low + value * (high - low)
                    return self.paper(point, point)[pick]

                return fraction, self.canvas.transFigure
            found = [axes for pair, axes in self.axes.items() if pair[pick] == ref]
            if not found:
                raise ValueError(f"a shape or annotation refers to axis {ref!r}, on which no trace is drawn")
            known = self.categories.get(ref, [])
            return (lambda value: known.index(value) if isinstance(value, str) else value), found[0].transData

        (x, x_transform), (y, y_transform) = of(x_ref, "x"), of(y_ref, "y")
        blend = blended_transform_factory(x_transform, y_transform)
        offset = ScaledTranslation(shift[0] / 96, shift[1] / 96, self.canvas.dpi_scale_trans)
        return x, y, blend + offset

    def _shapes(self) -> None:
        for shape in self.layout.shapes:
            x, y, transform = self._transform(shape.xref or "x", shape.yref or "y")
            (x0, x1), (y0, y1) = (x(shape.x0), x(shape.x1)), (y(shape.y0), y(shape.y1))
            width = 2 if shape.line.width is None else shape.line.width
            style = {
                "linewidth": width * PT,
                "linestyle": DASHES[shape.line.dash or "solid"],
                "alpha": shape.opacity,
                "zorder": 0.8 if shape.layer == "below" else 4,
                "transform": transform,
            }
            if shape.type == "line":
                self.canvas.add_artist(Line2D([x0, x1], [y0, y1], color=rgba(shape.line.color or TEXT), **style))
            elif shape.type == "rect":
                edge: Rgba | str = rgba(shape.line.color or TEXT) if width else "none"
                face = rgba(shape.fillcolor) if shape.fillcolor else "none"
                self.canvas.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=face, edgecolor=edge, **style))
            else:
                raise ValueError(f"the static twin draws shapes of type line and rect; found {shape.type!r}")

    def _annotations(self) -> None:
        horizontal = {"left": "left", "right": "right", "center": "center", "auto": "center", None: "center"}
        vertical = {"top": "top", "bottom": "bottom", "middle": "center", "auto": "center", None: "center"}
        for note in self.layout.annotations:
            if note.showarrow is not False:
                raise ValueError(f"the static twin draws no arrows; annotation {note.text!r} has one: showarrow=False")
            x, y, transform = self._transform(note.xref or "x", note.yref or "y", (note.xshift or 0, note.yshift or 0))
            text = self.canvas.text(x(note.x), y(note.y), plain(note.text), transform=transform, zorder=5)
            text.set(ha=horizontal[note.xanchor], va=vertical[note.yanchor], multialignment=note.align or "center")
            text.set(color=rgba(note.font.color or TEXT), fontsize=(note.font.size or FONT_SIZE) * PT, linespacing=1.3)
            text.set(rotation=-(note.textangle or 0), fontweight="bold" if "<b>" in note.text else "normal")
            if note.bgcolor:
                text.set_bbox({"facecolor": rgba(note.bgcolor), "edgecolor": "none", "pad": 1.5})

    def _title(self) -> None:
        if text := self.layout.title.text:
            left = self.box[0] / self.width
            size = (self._get("title", "font", "size") or 16) * PT
            self.canvas.text(left, 1 - 12 / self.height, plain(text), ha="left", va="top", color=TEXT, fontsize=size)

    def _legend(self) -> None:
        named = [
            trace for trace in self.traces if trace.name and trace.type != "heatmap" and trace.showlegend is not False
        ]
        entries = {plain(trace.name): handle(trace) for trace in named}
        wanted = self.layout.showlegend
        if wanted is False or not entries or (wanted is None and len(entries) < 2):
            return
        x, y = self._get("legend", "x"), self._get("legend", "y")
        vertical = {"bottom": "lower", "top": "upper", "middle": "center"}[self._get("legend", "yanchor") or "bottom"]
        corner = f"{vertical} {self._get('legend', 'xanchor') or 'left'}"
        longest = max(len(label) for label in entries) * 7.4 + 56
        flat = self._get("legend", "orientation") == "h"
        columns = max(1, min(len(entries), int(self.box[2] / longest))) if flat else 1
        self.canvas.legend(
            entries.values(),
            entries.keys(),
            loc=corner,
            bbox_to_anchor=self.paper(x, y),
            ncol=columns,
            frameon=False,
            fontsize=SMALL * PT,
            labelcolor=TEXT,
            handlelength=2.6,
            columnspacing=1.4,
            borderaxespad=0.4,
            borderpad=0,
        )

    def overflow(self) -> np.ndarray:
        """How many px the drawing leaves the canvas by: left, right, top, bottom."""
        renderer = self.canvas.canvas.get_renderer()
        box = self.canvas.get_tightbbox(renderer)  # inches
        left, bottom, right, top = (edge * 96 for edge in box.extents)
        return np.array([-left, right - self.width, top - self.height, -bottom])
