"""`Figure`: a plotly figure that also has a picture and a sentence."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import plotly.graph_objects as go

from fakit.figures.static import axes as static
from fakit.figures.theme import SMALL, TEXT
from fakit.files import write_whole

LINE = 17  # px a line of caption
# two buttons: more would cover the title of a small figure, and one of plotly's offers to upload it
CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage", "resetScale2d"]]}
PLOTLY = "application/vnd.plotly.v1+json"


def check_path(path: str | Path) -> Path:
    """The path, if a figure can be written there; asked before the work whose figure it is to hold.

    Raises:
        ValueError: another kind of file, a folder in its place, or no folder to write to.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".html"):
        raise ValueError(f"cannot save a figure as {path.suffix or path.name!r}: use .svg, .png or .html")
    if path.is_dir():
        raise ValueError(f"cannot save a figure as {path}: that is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"cannot save a figure as {path}: there is no folder {path.parent}; make it, or name another")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot save a figure as {path}: {path.parent} may not be written to; name another folder")
    return path


class Figure:
    """A plotly figure, its static twin and its one-sentence summary, in one object.

    Args:
        plotly: the interactive figure; it is used as it is, not copied.
        summary: one sentence with the key numbers: what a screen reader, a terminal or a diff gets.
        caption: a sentence drawn under the picture in both forms; the figure grows by the lines it needs.

    A notebook shows it by `_repr_mimebundle_`: plotly JSON where there is a renderer, else SVG, else the sentence.
    """

    def __init__(self, plotly: go.Figure, summary: str, caption: str = "") -> None:
        if not summary.strip():
            raise ValueError("a figure needs a summary: one sentence with its key numbers; found an empty string")
        self.plotly = plotly
        self.summary = " ".join(summary.split())
        self.caption = " ".join(caption.split())
        if self.caption:
            self._draw_caption()

    def _draw_caption(self) -> None:
        layout = self.plotly.layout
        width = layout.width or layout.template.layout.width or 720
        margin = layout.margin.to_plotly_json()
        below = margin.get("b", 56)
        room = width - margin.get("l", 70) - 8
        lines = textwrap.wrap(self.caption, width=max(30, int(room / 6.4)))
        self.plotly.add_annotation(
            name="caption",
            text="<br>".join(lines),
            showarrow=False,
            align="left",
            font={"size": SMALL, "color": TEXT},
            x=0,
            xref="paper",
            xanchor="left",
            y=0,
            yref="paper",
            yanchor="top",
            yshift=-below - 2,
        )
        extra = LINE * len(lines) + 12
        self.plotly.update_layout(height=(layout.height or 360) + extra, margin={**margin, "b": below + extra})

    def svg(self) -> str:
        """The static twin: an SVG document with real text, a title and a description."""
        return static.to_svg(self.plotly, self.summary)

    def save(self, path: str | Path) -> Path:
        """Write `.svg` or `.png` (the static twin) or `.html` (interactive, plotly.js inside, no network)."""
        path = check_path(path)
        if path.suffix == ".svg":
            write_whole(path, self.svg())
        elif path.suffix == ".png":
            write_whole(path, static.to_png(self.plotly))
        else:
            self.plotly.write_html(path, include_plotlyjs=True, full_html=True, config=CONFIG)
        return path

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        spec = json.loads(self.plotly.to_json())  # NaN becomes null, arrays plotly's base64: strict JSON
        spec["config"] = CONFIG
        return {PLOTLY: spec, "image/svg+xml": self.svg(), "text/plain": self.summary}

    def __repr__(self) -> str:
        return self.summary
