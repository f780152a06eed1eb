"""Loss weights: how the total of one cached batch is made of its terms, and what a weight does to it."""

from __future__ import annotations

import ipywidgets as widgets
import torch
from torch import Tensor

from fakit.figures import Figure, loss_bars
from fakit.objective.objective import Objective
from fakit.widgets.panel import LABEL, WIDE, Panel


def weight_slider(
    description: str, value: float, highest: float, lowest: float = 0.0, width: str = WIDE
) -> widgets.FloatSlider:
    """A slider from `lowest` to at least `highest` in steps of 0.05, that tells when it is let go."""
    return widgets.FloatSlider(
        value=value,
        min=lowest,
        max=max(highest, value),
        step=0.05,
        description=description,
        continuous_update=False,
        readout_format=".2f",
        style=LABEL,
        layout={"width": width},
    )


class LossWeights(Panel):
    """See `loss_weights`.

    Attributes:
        sliders: term name → its weight's slider.
        temperature: τ's slider, or None without an output term.
        total: the weighted sum of this moment.
        terms: raw losses of the terms whose weight is above 0.
    """

    def __init__(self, objective: Objective, student_trace, teacher_trace, labels=None, maximum=None):
        self._objective = objective
        self._traces = (student_trace.detach(), None if teacher_trace is None else teacher_trace.detach())
        self._labels = labels
        highest = (
            max(2.0, *(2 * weight for weight in objective.weights.values())) if maximum is None else float(maximum)
        )
        if above := {name: weight for name, weight in objective.weights.items() if weight > highest}:
            raise ValueError(f"weights {above} are above the sliders' maximum of {highest:g}; raise maximum")
        names = [name for name in objective.weights if labels is not None or not objective.terms[name].needs_labels]
        self.sliders = {name: weight_slider(f"weight: {name}", objective.weights[name], highest) for name in names}
        tau = objective.temperature
        self.temperature = None if tau is None else weight_slider("temperature τ", tau, 10.0, 0.25)
        self._axis = 0.0  # right end of the axis: the largest bar so far, so that bars move and the scale rarely does
        controls = [*self.sliders.values(), *([] if self.temperature is None else [self.temperature])]
        super().__init__(controls)
        for control in controls:
            control.observe(self._write, "value")

    def _write(self, change: object = None) -> None:
        for name, slider in self.sliders.items():
            if slider.value != self._objective.weights[name]:  # one that was not moved keeps its schedule
                self._objective.weights[name] = slider.value
        if self.temperature is not None and self.temperature.value != self._objective.temperature:
            self._objective.temperature = self.temperature.value
        self.refresh()

    def draw(self) -> tuple[Figure, str]:
        """The objective on the cached traces, at the sliders' weights."""
        weights = {name: slider.value for name, slider in self.sliders.items()}
        self.terms, self.total = {}, 0.0
        if any(weights.values()):
            with torch.no_grad():
                breakdown = self._objective(*self._traces, self._labels)
            self.terms = {name: value.item() for name, value in breakdown.terms.items()}
            self.total = breakdown.total.item()
        products = {name: weights[name] * value for name, value in self.terms.items()}
        self._axis = max(self._axis, *products.values(), 0.0)
        figure = loss_bars(self.terms, weights, limit=self._axis, title="Weighted loss by term, one batch")
        if not products:
            return figure, "Every weight is 0: nothing is left to learn from. Training would refuse to start."
        first = max(products, key=products.get)
        share = products[first] / self.total if self.total else 0.0
        return figure, f"Total {self.total:.3g}; the largest part is {first}, {100 * share:.0f} % of it."


def loss_weights(
    objective: Objective,
    student_trace,
    teacher_trace,
    labels: Tensor | None = None,
    maximum: float | None = None,
) -> LossWeights:
    """A slider for each term's weight (and for τ where outputs are matched), and the loss of one batch as bars.

    The models do not run again: the traces are kept, without graph, and each change asks the objective anew. Every
    change is written into `objective.weights` and `objective.temperature`,
    so a training loop that uses this objective follows.

    Args:
        objective: whose weights are moved.
        student_trace, teacher_trace: `Trace` of one batch, with all that the objective's terms look at.
        labels: (B,) or (B, T), -100 = none; without them the task term has no slider, and keeps its weight.
        maximum: right end of the weight sliders; by default 2, or twice the largest weight.

    Raises:
        ValueError: a weight above `maximum`, or traces that lack what an active term needs.

    >>> weights = loss_weights(objective, student_trace, teacher_trace, labels)  # doctest: +SKIP
    >>> weights.sliders["features"].value = 0.3  # doctest: +SKIP
    >>> objective.weights["features"]  # doctest: +SKIP
    0.3
    """
    return LossWeights(objective, student_trace, teacher_trace, labels, maximum)
