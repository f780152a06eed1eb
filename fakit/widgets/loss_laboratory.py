"""Loss laboratory: what each term adds to the loss, how hard it pulls, where, and against which other,
as weights and τ move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets
from torch import Tensor, nn

from fakit.evaluation.batches import eval_mode
from fakit.figures import Figure, term_pulls
from fakit.objective.gradients import (
    ALL,
    TermGradients,
    balanced_weights,
    gradients_by_temperature,
    part_name,
    term_gradients,
)
from fakit.objective.objective import Objective
from fakit.widgets.panel import LABEL, WIDE, Panel
from fakit.widgets.weights import weight_slider

TEMPERATURES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


class LossLaboratory(Panel):
    """See `loss_laboratory`.

    Attributes:
        sliders: term → its weight's slider.
        temperature: τ's slider, or None without an output term.
        part: the part of the student whose cosines are shown.
        balance, reset, apply, again: the buttons; `lab.balance.click()` presses one from code.
        failure: what the last measuring raised, or None; `result()` raises it.
    """

    def __init__(self, objective, teacher, student, batches, temperatures=TEMPERATURES, reference="task"):
        self._objective, self._models, self._reference = objective, (teacher, student), reference
        self._batches = [batches] if isinstance(batches, Mapping) else list(batches)
        self._temperatures = list(temperatures)
        self.failure: Exception | None = None
        self.measure()
        names = self._now[0].terms
        ends = self._ends_of_sliders()
        self.sliders = {name: weight_slider(f"weight: {name}", objective.weights[name], ends[name]) for name in names}
        self.temperature = None
        if objective.temperature is not None:
            self.temperature = widgets.SelectionSlider(
                options=[(f"{tau:g}", tau) for tau in self._measured],
                value=objective.temperature,
                description="temperature τ",
                continuous_update=False,
                style=LABEL,
                layout={"width": WIDE},
            )
        self.part = widgets.ToggleButtons(
            options=[("all", ALL), *((part_name(part), part) for part in self._now[0].parts)],
            description="cosines in",
            style={"description_width": "70px", "button_width": "auto"},
        )
        self.balance = _button("balance", "weights under which every term pulls as hard as the task", self._balance)
        self.reset = _button("reset", "the weights and τ that the objective holds", self._reset)
        self.apply = _button("apply", "write these weights and τ into the objective", self._apply)
        self.again = _button(
            "measure again", "run the models on the batches anew, after a step of training", self._again
        )
        self._ends = (0.0, 0.0, 0.0)  # of the axes: they grow, so that bars move and scales rarely do
        self._formula, self._alert, self._table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        controls = [*self.sliders.values(), *([] if self.temperature is None else [self.temperature]), self.part]
        buttons = widgets.HBox([self.balance, self.reset, self.apply, self.again])
        super().__init__([*controls, buttons, self._alert, self._formula])
        self.children = (*self.children, self._table)
        self._held = False
        for control in controls:
            control.observe(self._moved, "value")

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """The sliders' weights; the objective has them after `apply`."""
        return {name: slider.value for name, slider in self.sliders.items()}

    @property
    def gradients(self) -> TermGradients:
        """What was measured, at the slider's τ."""
        return self._measured[None if self.temperature is None else self.temperature.value]

    @property
    def total(self) -> float:
        """The weighted sum of this moment."""
        return self.gradients.total(self.weights)

    def rows(self) -> list[dict]:
        """One row a term: term, weight, loss, weighted, share, norm, pull (weighted norm), pairs;
        `pandas.DataFrame(lab.rows())`.
        """
        now, weights, total = self.gradients, self.weights, self.total
        norms, pulls = now.norms(), now.norms(weights)
        return [
            {
                "term": name,
                "weight": weights[name],
                "loss": loss,
                "weighted": weights[name] * loss,
                "share": weights[name] * loss / total if total else 0.0,
                "norm": norms[name],
                "pull": pulls[name],
                "pairs": now.per_layer.get(name, {}),
            }
            for name, loss in now.losses.items()
        ]

    def result(self) -> TermGradients:
        """What was measured; raises what the last measuring raised."""
        if self.failure is not None:
            raise self.failure
        return self.gradients

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Run the models on the batches, dropout off; nothing changes where it fails.

        Raises:
            ValueError: a loss or gradient that is not finite, by name, and whatever capture and the objective refuse.
        """
        teacher, student = self._models
        try:
            with eval_mode(student):
                if self._objective.temperature is None:
                    measured = {None: term_gradients(self._objective, teacher, student, self._batches)}
                else:
                    taus = sorted({*self._temperatures, self._objective.temperature})
                    measured = gradients_by_temperature(self._objective, teacher, student, self._batches, taus)
        except Exception as error:
            self.failure = error
            raise
        self.failure, self._measured, self._now = None, measured, list(measured.values())

    def _again(self) -> None:
        try:
            self.measure()
        except Exception as error:  # shown here, raised by result(): an exception in a callback would be seen by nobody
            self._alert.value = (
                '<div role="alert" style="color:var(--jp-error-color1,#c62828);max-width:900px"><b>Not measured: '
                f"{escape(str(error))}</b> "
                "What is shown are the numbers of before; <code>lab.result()</code> raises the error.</div>"
            )
            return
        self._alert.value = ""
        if self.temperature is not None:
            with self._at_once():
                tau = self.temperature.value
                self.temperature.options = [(f"{t:g}", t) for t in self._measured]
                self.temperature.value = tau if tau in self._measured else self._objective.temperature

    def _ends_of_sliders(self) -> dict[str, float]:
        """Far enough to find by hand what *balance* would say: 5, twice the weight,
        or a quarter beyond the balanced one (at most 20).
        """
        weights, now = self._objective.weights, self._measured[self._objective.temperature]
        held = {name: weights[name] for name in now.terms}
        try:
            found = balanced_weights(now, held, self._reference)
        except ValueError:  # nothing to balance: every weight is 0, or a term without a gradient
            found = held
        return {name: float(math.ceil(max(5.0, 2 * held[name], min(20.0, 1.25 * found[name])))) for name in now.terms}

    # -- buttons ------------------------------------------------------------------------------------------------------

    def balanced(self) -> dict[str, float]:
        """Weights under which every term that is on pulls as hard as the reference:
        `fakit.objective.gradients.balanced_weights`.
        """
        return balanced_weights(self.gradients, self.weights, self._reference)

    def _balance(self) -> None:
        before, norms = self.weights, self.gradients.norms()
        try:
            found = self.balanced()
        except ValueError as error:
            self._formula.value = f'<div role="alert">{escape(str(error))}</div>'
            return
        on = [name for name, weight in before.items() if weight > 0]
        held = self._reference if self._reference in on else on[0]
        lines = [f"w_i = w_{held} · ‖∇L_{held}‖ / ‖∇L_i‖    (GradNorm’s goal at α = 0, Chen et al. 2018)"]
        lines += [
            f"w_{name} = {before[held]:.3g} · {norms[held]:.4g} / {norms[name]:.4g} = {found[name]:.4g}"
            for name in on
            if name != held
        ]
        self._set(found)
        style = "line-height:1.4;margin:4px 0;font-size:13px;color:var(--jp-content-font-color1,inherit)"
        self._formula.value = (
            f'<pre role="status" aria-live="polite" style="{style}">{escape(chr(10).join(lines))}</pre>'
        )

    def _reset(self) -> None:
        self._formula.value = ""
        self._set({name: self._objective.weights[name] for name in self.sliders}, own_temperature=True)

    def _apply(self) -> None:
        self._objective.weights.update(self.weights)
        if self.temperature is not None:
            self._objective.temperature = self.temperature.value
        self.refresh()

    def _set(self, weights: Mapping[str, float], own_temperature: bool = False) -> None:
        """Move the sliders, wider where they must be, and draw once."""
        with self._at_once():
            for name, weight in weights.items():
                slider = self.sliders[name]
                slider.max = max(slider.max, 1.25 * weight)
                slider.value = weight
            if own_temperature and self.temperature is not None and self._objective.temperature in self._measured:
                self.temperature.value = self._objective.temperature

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.refresh()

    def _moved(self, change: object = None) -> None:
        if not self._held:
            self.refresh()

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self) -> tuple[Figure, str]:
        """The four panels at the sliders' weights and τ."""
        now, weights, part, rows = self.gradients, self.weights, self.part.value, self.rows()
        norms = {place if place == ALL else part_name(place): now.norms(weights, place) for place in (ALL, *now.parts)}
        losses = {row["term"]: row["weighted"] for row in rows}
        by_layer = [value for place, by in norms.items() if place != ALL for value in by.values()]
        seen = (max(losses.values()), max(norms[ALL].values()), max(by_layer))
        self._ends = tuple(map(max, self._ends, seen))
        where = part if part == ALL else part_name(part)
        figure = term_pulls(losses, norms, now.cosines(part).numpy(), where, self._ends)
        self._table.value = self._rows_as_html(rows)
        if not any(weights.values()):
            return figure, "Every weight is 0: nothing is left to learn from. Training would refuse to start."
        tau = "" if now.temperature is None else f" at τ = {now.temperature:g}"
        held = self._objective.weights
        kept = all(held[name] == weight for name, weight in weights.items())
        kept = kept and (now.temperature is None or now.temperature == self._objective.temperature)
        says = (
            "The objective holds these weights." if kept else "Not applied: the objective holds its own weights still."
        )
        return figure, f"{figure.summary[:-1]}{tau}; the whole gradient has norm {now.total_norm(weights):.3g}. {says}"

    def _rows_as_html(self, rows: Sequence[Mapping]) -> str:
        cell = 'style="padding:2px 12px 2px 0;text-align:right"'
        first = 'style="padding:2px 12px 2px 0;text-align:left"'
        heads = (
            "term",
            "loss",
            "weight",
            "weight × loss",
            "share",
            "‖gradient‖",
            "weight × ‖gradient‖",
            "loss by layer pair",
        )
        body = []
        for row in rows:
            pairs = ", ".join(f"S{s}←T{t} {value:.3g}" for (s, t), value in row["pairs"].items())
            numbers = [f"{row[key]:.4g}" for key in ("loss", "weight", "weighted")]
            numbers += [f"{100 * row['share']:.0f} %", f"{row['norm']:.4g}", f"{row['pull']:.4g}"]
            cells = "".join(f"<td {cell}>{number}</td>" for number in numbers)
            body.append(
                f'<tr><th scope="row" {first}>{escape(row["term"])}</th>{cells}<td {first}>{pairs or "–"}</td></tr>'
            )
        head = "".join(f'<th scope="col" {first if h in (heads[0], heads[-1]) else cell}>{h}</th>' for h in heads)
        style = "border-collapse:collapse;font-size:13px;line-height:1.5;color:var(--jp-content-font-color1,inherit)"
        return f'<table style="{style}"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def loss_laboratory(
    objective: Objective,
    teacher: nn.Module | None,
    student: nn.Module,
    batches: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    temperatures: Sequence[float] = TEMPERATURES,
    reference: str = "task",
) -> LossLaboratory:
    """Sliders for the weights and τ, and what they make of the loss and of its gradients,
    on batches that are measured once.

    The models run once, dropout off: gradients are linear in the weights, so that inner products between the terms'
    gradients say all there is to say under any weights; τ is measured at each of `temperatures` (and at the objective's
    own). Moving a slider runs no model. The objective keeps its weights until *apply* is pressed; *measure again* runs
    the models anew, after some training.

    Args:
        teacher: None where no term looks at one.
        batches: one batch or several, with labels for the task term.
        temperatures: the τ that the slider stops at.
        reference: the term that *balance* holds.

    Raises:
        ValueError: a loss or gradient that is not finite (named by term and layer), and what
            `fakit.objective.gradients.term_gradients` refuses.

    >>> lab = loss_laboratory(objective, teacher, student, batches)  # doctest: +SKIP
    >>> lab.sliders["features"].value = 0.3  # doctest: +SKIP
    >>> lab.balance.click()  # doctest: +SKIP
    >>> lab.apply.click()  # doctest: +SKIP
    """
    return LossLaboratory(objective, teacher, student, batches, temperatures, reference)


def _button(name: str, tooltip: str, press: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=name, tooltip=tooltip, layout={"width": "auto", "margin": "4px 8px 4px 0"})
    button.on_click(lambda _: press())
    return button
