"""A function's figure in the hand: one control for each of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import ipywidgets as widgets

from fakit.figures import Figure
from fakit.widgets.panel import LABEL, WIDE, Panel


class Explorer(Panel):
    """See `explorer`.

    Attributes:
        controls: argument → its control; `found.controls["beta"].value = 0.9` moves one from code.
    """

    def __init__(self, draw: Callable[..., Figure], controls: dict[str, tuple | list], labels: dict[str, str] | None):
        takes = signature(draw).parameters
        if unknown := [name for name in controls if name not in takes]:
            raise ValueError(f"draw takes {', '.join(takes) or 'nothing'}; there is no {', '.join(unknown)} to move")
        if not controls:
            raise ValueError("an explorer moves something: name an argument, such as beta=(0, 1, 0.1)")
        self._figure_of = draw
        self.controls = {
            name: _control(name, given, takes[name].default, (labels or {}).get(name, name))
            for name, given in controls.items()
        }
        super().__init__(list(self.controls.values()))
        for control in self.controls.values():
            control.observe(self.refresh, "value")

    @property
    def values(self) -> dict[str, Any]:
        """What `draw` is called with now."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self) -> tuple[Figure, str]:
        """The figure of the controls' values, and its summary."""
        figure = self._figure_of(**self.values)
        return figure, figure.summary


def explorer(draw: Callable[..., Figure], labels: dict[str, str] | None = None, **controls: tuple | list) -> Explorer:
    """A control for each named argument of a function, and the figure that it returns for them.

    Args:
        draw: gives a `Figure`; the defaults of its arguments are where the controls start. It is called at once, and
            whenever a control is let go.
        labels: argument → what stands before its control; its name by default.
        controls: argument → (lowest, highest, step) for a slider, of whole numbers where all three and the default are,
            or a list to choose from, as `ipywidgets.interact` has it.

    Raises:
        ValueError: an argument that `draw` does not have, no argument, a range that is none, or a start outside of it.

    >>> from fakit.figures import softened
    >>> def both(p=0.5):
    ...     return softened({1: ([p, 1 - p], None)}, ["yes", "no"])
    >>> found = explorer(both, p=(0.0, 1.0, 0.05))
    >>> found.controls["p"].value = 0.75
    >>> found.sentence
    'At temperature 1 the teacher gives ‘yes’ 0.75.'
    """
    return Explorer(draw, controls, labels)


def _control(name: str, given: tuple | list, start: Any, label: str) -> widgets.Widget:
    if isinstance(given, list):
        if len(given) < 2 or start not in given:
            raise ValueError(
                f"{name} is chosen from two values or more, of which its default is one: {given}, {start!r}"
            )
        return widgets.ToggleButtons(
            options=given, value=start, description=label, style={**LABEL, "button_width": "auto"}
        )
    low, high, step = _range(name, given)
    if not isinstance(start, (int, float)) or not low <= start <= high:
        raise ValueError(f"{name} goes from {low:g} to {high:g}, and its default in draw is {start!r}")
    whole = all(type(number) is int for number in (start, low, high, step))
    return (widgets.IntSlider if whole else widgets.FloatSlider)(
        value=start,
        min=low,
        max=high,
        step=step,
        description=label,
        continuous_update=False,
        style=LABEL,
        layout={"width": WIDE},
    )


def _range(name: str, given: Sequence[float]) -> tuple[float, float, float]:
    if len(given) != 3 or not given[0] < given[1] or not given[2] > 0:
        raise ValueError(f"{name} wants (lowest, highest, step) or a list to choose from; found {given!r}")
    low, high, step = given
    return low, high, step
