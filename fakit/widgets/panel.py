"""`Panel`: controls, a figure that follows them, and a sentence; what every widget of the kit is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets

from fakit.figures import Figure
from fakit.figures.figure import PLOTLY

WIDGET = "application/vnd.jupyter.widget-view+json"
LABEL = {"description_width": "150px"}  # one column of labels, wide enough for "temperature τ" and term names
WIDE = "560px"
# JupyterLab marks a focused button by a line of one gray pixel, which this must win against, and a handle not at all
FOCUS = """
.fakit-focus button:focus-visible, .fakit-focus input:focus-visible, .fakit-focus .noUi-handle:focus-visible {
  outline: 3px solid #1F83C4 !important; outline-offset: 2px;
}
"""


def spoken(sentence: str) -> str:
    """HTML of a sentence that a screen reader announces when it changes."""
    return f'<div role="status" aria-live="polite">{escape(sentence)}</div>'


def script_json(state: dict) -> str:
    """JSON for a `<script type="application/json">`: nothing that a token or a recipe says may end the script."""
    text = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")


def style(css: str) -> widgets.HTML:
    """Rules for a widget that has this among its children; it takes no room."""
    return widgets.HTML(f"<style>{css}</style>", layout={"display": "none"})


def with_still(bundle: tuple[dict, dict], figure: Figure | None, text: str) -> tuple[dict, dict]:
    """A widget's mime bundle, and what a page without a kernel shows in its place: `figure` as SVG,
    if there is one, and `text`.
    """
    data, metadata = bundle
    still = {} if figure is None else {"image/svg+xml": figure.svg()}
    return {**data, **still, "text/plain": text}, metadata


class Panel(widgets.VBox):
    """A box of controls above a figure and a sentence that a screen reader announces.

    A subclass builds its controls, implements `draw`, calls `super().__init__(controls)` last, and binds its controls'
    `observe` to `refresh`.

    Attributes:
        figure: what is shown now; a cell may show it by itself, and `figure.save` writes it.
        sentence: what stands below it.

    Its display is the widget where there is a kernel, and beside it the figure as SVG and as one sentence: a saved
    page, GitHub and a screen reader have those. They are what the panel shows when the cell runs.
    """

    figure: Figure
    sentence: str

    def __init__(self, controls: Sequence[widgets.Widget]):
        # An Output whose content is set as a value: nothing is captured, so a callback of any thread may redraw, and
        # plotly draws it as it draws every other figure of the notebook.
        self._picture = widgets.Output()
        self._sentence = widgets.HTML()
        super().__init__([*controls, self._picture, self._sentence, style(FOCUS)])
        self.add_class("fakit-focus")
        self.refresh()

    def draw(self) -> tuple[Figure, str]:
        """The figure of this moment, and the sentence below it."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing: a Panel implements draw() -> (Figure, str)")

    def refresh(self, change: object = None) -> None:
        """Draw anew; call it after changing in code what the panel shows."""
        self.figure, self.sentence = self.draw()
        spec = json.loads(self.figure.plotly.to_json()) | {"config": {"displayModeBar": False}}
        # without the SVG twin: it takes matplotlib ten times as long, and only a page without a kernel needs it
        data = {PLOTLY: spec, "text/plain": self.figure.summary}
        # the height is held, or the page would jump each time one picture makes way for the next
        self._picture.layout.min_height = f"{self.figure.plotly.layout.height + 12}px"
        self._picture.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        self._sentence.value = spoken(self.sentence)

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        still = {"image/svg+xml": self.figure.svg(), "text/plain": self.figure.summary}
        return {**super()._repr_mimebundle_(**kwargs), **still}
