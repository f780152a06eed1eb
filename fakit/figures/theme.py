"""The visual language: one place for colors, dashes, markers, letters, sizes and color scales.

Every role color has a contrast of at least 3:1 on white and on `#111`, and the text gray at least 4:1, so that one
picture with a transparent background reads in a light and in a dark notebook. Teacher and student have nearly equal
luminance: dash, marker and letter carry the difference where color does not (print, color blindness).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import get_colorscale

TEXT = "#777777"  # 4.5:1 on white, 4.2:1 on #111
GRID = "rgba(119,119,119,0.25)"
FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
FONT_SIZE = 13  # px; nothing in a figure is smaller than SMALL
SMALL = 12

LINES = (720, 360)  # width, height in px
HEATMAP = (560, 480)
WIDE = 820  # px: what JupyterLab has for an output in a window of 1280 beside its file browser
PAIR = (WIDE, 420)


def pattern(shape: str, color: str) -> dict:
    """plotly bar `pattern` of white strokes on `color`; empty for no shape."""
    if not shape:
        return {}
    return {"shape": shape, "bgcolor": color, "fgcolor": "#FFFFFF", "fgopacity": 0.9, "size": 7, "solidity": 0.2}


@dataclass(frozen=True)
class Role:
    """How one actor is drawn: its name, color, plotly dash, plotly marker symbol, letter and bar pattern."""

    name: str
    color: str
    dash: str
    symbol: str
    letter: str
    pattern: str = ""

    def line(self, width: float = 2.0) -> dict:
        """plotly `line` attributes."""
        return {"color": self.color, "dash": self.dash, "width": width}

    def marker(self, size: float = 9.0, **extra: object) -> dict:
        """plotly `marker` attributes for points."""
        return {"color": self.color, "symbol": self.symbol, "size": size, **extra}

    def bar(self) -> dict:
        """plotly `marker` attributes for bars: the pattern tells bars apart without color."""
        return {"color": self.color, "pattern": pattern(self.pattern, self.color), "line": {"width": 0}}

    def tint(self, alpha: float) -> str:
        """The role's color as `rgba(…)`, for bands."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha:g})"


TEACHER = Role("teacher", "#1F83C4", "solid", "circle", "T")
STUDENT = Role("student", "#D55E00", "dash", "diamond", "S", "/")
BASELINE = Role("baseline", "#7A7A7A", "dot", "square", "B", ".")
ALIGNED = Role("aligned", "#009E73", "dashdot", "triangle-up", "A", "x")
EXTRA = Role("extra", "#AA4499", "longdash", "cross", "E", "\\")
ROLES = (TEACHER, STUDENT, BASELINE, ALIGNED, EXTRA)

ARMS = {
    "none": BASELINE,
    "outputs": Role("outputs", TEACHER.color, "solid", "circle", "O"),
    "features": Role("features", STUDENT.color, "dash", "diamond", "F", "/"),
    "attention": Role("attention", EXTRA.color, "longdash", "cross", "A", "\\"),
    "all": Role("all", ALIGNED.color, "dashdot", "triangle-up", "*", "x"),
    "task": Role("task", BASELINE.color, "dot", "square", "Y", "."),
    "reverse": Role("reverse", BASELINE.color, "dot", "x", "R", "."),  # a control, as `none` is, and not the same one
}
_SPARE = (EXTRA, ALIGNED, STUDENT, BASELINE, TEACHER)


def arm(name: str, position: int = 0) -> Role:
    """The role of an arm of a study (or of a loss term) by its name; an unknown name takes a spare style.

    `"all, equal compute"` and `"none/long"` take the style of the word they begin with.
    """
    first = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    for word in first[:1]:
        if word in ARMS:
            return ARMS[word]
    return _SPARE[position % len(_SPARE)]


def model_role(label: str) -> Role:
    """TEACHER for `teacher…` or `T3`, STUDENT for `student…` or `S1`, EXTRA for anything else."""
    head = label.strip().lower()
    if head.startswith("teacher") or (head[:1] == "t" and head[1:].isdigit()):
        return TEACHER
    if head.startswith("student") or (head[:1] == "s" and head[1:].isdigit()):
        return STUDENT
    return EXTRA


def layer_names(letter: str, count: int) -> list[str]:
    """`["T0", "T1", …]`: 0 is the output of the embeddings, i that of block i; `count` counts 0 too."""
    return [f"{letter}{i}" for i in range(count)]


Scale = list[list]  # [[0.0, "#…"], …, [1.0, "#…"]]: what plotly calls a colorscale
SIMILARITY: Scale = [list(stop) for stop in get_colorscale("Cividis")]
DISTANCE: Scale = [[1 - position, color] for position, color in reversed(SIMILARITY)]
DIFFERENCE: Scale = [
    [0.0, "#0B4F80"],
    [0.25, "#5BA6D6"],
    [0.5, "#F2F2F2"],
    [0.75, "#E8945A"],
    [1.0, "#943F00"],
]  # teacher's blue below zero, student's vermilion above, neutral in the middle


def ramp(role: Role) -> Scale:
    """One light-to-dark ramp of the role's hue, for attention and other shares that start at zero."""
    red, green, blue = (int(role.color[i : i + 2], 16) for i in (1, 3, 5))
    light = "#{:02x}{:02x}{:02x}".format(*(round(c + (255 - c) * 0.92) for c in (red, green, blue)))
    dark = "#{:02x}{:02x}{:02x}".format(*(round(c * 0.55) for c in (red, green, blue)))
    return [[0.0, light], [0.55, role.color], [1.0, dark]]


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": TEXT,
        "zerolinecolor": TEXT,
        "zerolinewidth": 1,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": TEXT,
        "automargin": False,
        "tickfont": {"size": SMALL, "color": TEXT},
        "title": {"font": {"size": FONT_SIZE, "color": TEXT}, "standoff": 8},
    }
    layout = go.Layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": FONT_SIZE, "color": TEXT},
        colorway=[role.color for role in ROLES],
        title={
            "font": {"size": 16, "color": TEXT},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 12},
        },
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": SMALL, "color": TEXT},
        },
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": TEXT, "activecolor": TEACHER.color},
        hoverlabel={"font": {"family": FONT, "size": SMALL}},
        width=LINES[0],
        height=LINES[1],
        margin={"l": 70, "r": 24, "t": 76, "b": 56},
        xaxis={**axis, "zeroline": False},
        yaxis=axis,
        colorscale={"sequential": SIMILARITY, "diverging": DIFFERENCE},
    )
    return go.layout.Template(layout=layout)


TEMPLATE = _template()
pio.templates["fakit"] = TEMPLATE


def use_template() -> None:
    """Make `fakit` plotly's default template, for figures that a reader draws by hand."""
    pio.templates.default = "fakit"


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two `#rrggbb` colors, 1 to 21."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ np.array([0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
