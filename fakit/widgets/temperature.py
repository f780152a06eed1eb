"""Temperature: what softening does to the distributions that a student is asked to match."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import ipywidgets as widgets
import torch
from torch import Tensor

from fakit.figures import Figure, softened
from fakit.widgets.panel import LABEL, WIDE, Panel

LOWEST, HIGHEST = 0.25, 20.0


class TemperatureExplorer(Panel):
    """See `temperature_explorer`.

    Attributes:
        slider: τ; `explorer.slider.value = 4` moves it from code.
        chooser: the number of the input shown, from 1, where there are several.
    """

    def __init__(self, teacher_logits, labels_text, student_logits=None, texts=None, temperature=2.0):
        self._labels = list(labels_text)
        self._teacher = _rows("teacher", teacher_logits, self._labels)  # (N, C)
        self._student = None if student_logits is None else _rows("student", student_logits, self._labels)
        if self._student is not None and self._student.shape != self._teacher.shape:
            raise ValueError(
                f"teacher logits are of {len(self._teacher)} inputs, student logits of {len(self._student)}; "
                "give both models the same inputs"
            )
        texts = [f"input {i + 1}" for i in range(len(self._teacher))] if texts is None else list(texts)
        if len(texts) != len(self._teacher):
            raise ValueError(
                f"{len(texts)} texts for the logits of {len(self._teacher)} inputs; give one text an input"
            )
        if not LOWEST <= temperature <= HIGHEST:
            raise ValueError(f"temperature {temperature!r} is outside the slider's {LOWEST:g} to {HIGHEST:g}")
        # four steps an octave: from 0.25 by the keyboard one meets 0.5, 1, 2, 4, 8 and 16 exactly
        self.slider = widgets.FloatLogSlider(
            value=temperature,
            base=2,
            min=math.log2(LOWEST),
            max=math.log2(HIGHEST),
            step=0.25,
            description="temperature τ",
            continuous_update=False,
            readout_format=".2f",
            style=LABEL,
            layout={"width": WIDE},
        )
        # a slider, not a drop-down list: JupyterLab keeps the arrow keys of a list for itself, those of a slider not
        self.chooser = widgets.IntSlider(
            value=1,
            min=1,
            max=len(texts),
            description="input number",
            continuous_update=False,
            style=LABEL,
            layout={"width": WIDE},
        )
        self._texts = texts
        super().__init__([self.chooser, self.slider] if len(texts) > 1 else [self.slider])
        self.slider.observe(self.refresh, "value")
        self.chooser.observe(self.refresh, "value")

    @property
    def temperature(self) -> float:
        """τ as the slider has it."""
        return self.slider.value

    def draw(self) -> tuple[Figure, str]:
        """The chosen input's distributions at τ = 1 and at the slider's τ."""
        i, tau = self.chooser.value - 1, round(self.temperature, 4)
        rows = [self._teacher[i], None if self._student is None else self._student[i]]  # (C,)

        def at(temperature: float) -> tuple:
            return tuple(None if row is None else (row / temperature).softmax(-1).numpy() for row in rows)

        title = f"Outputs for ‘{textwrap.shorten(self._texts[i], 64, placeholder=' …')}’"
        figure = softened({t: at(t) for t in dict.fromkeys((1.0, tau))}, self._labels, title=title)
        p = (rows[0] / tau).softmax(-1)
        entropy, most = -torch.special.xlogy(p, p).sum().item(), math.log(len(p))
        sentence = (
            f"At τ = {tau:.2f} the teacher gives ‘{self._labels[int(p.argmax())]}’ {p.max():.2f} and the other "
            f"{len(p) - 1} labels {1 - p.max():.2f} together; entropy {entropy:.2f} of at most {most:.2f} nats."
        )
        return figure, sentence


def temperature_explorer(
    teacher_logits: Tensor | Sequence,
    labels_text: Sequence[str],
    student_logits: Tensor | Sequence | None = None,
    texts: Sequence[str] | None = None,
    temperature: float = 2.0,
) -> TemperatureExplorer:
    """A slider for τ, and the teacher's (and student's) distribution at τ = 1 beside that at τ.

    Args:
        teacher_logits: (C,), or (N, C) for N inputs to choose from.
        labels_text: C class names, or token strings.
        student_logits: of the same inputs.
        texts: N, what the inputs say.
        temperature: where the slider starts, 0.25 to 20.

    Raises:
        ValueError: logits that do not fit the labels, the texts, each other, or are not finite;
            a temperature off the slider.

    >>> explorer = temperature_explorer([2.0, 0.5, -1.0], ["positive", "neutral", "negative"])
    >>> explorer.slider.value = 8
    >>> explorer.sentence
    'At τ = 8.00 the teacher gives ‘positive’ 0.40 and the other 2 labels 0.60 together;
    entropy 1.09 of at most 1.10 nats.'
    """
    return TemperatureExplorer(teacher_logits, labels_text, student_logits, texts, temperature)


def _rows(who: str, logits, labels: list[str]) -> Tensor:
    rows = torch.as_tensor(logits).detach().to("cpu", torch.float64)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != len(labels) or len(rows) == 0:
        raise ValueError(
            f"the {who}'s logits have shape {tuple(torch.as_tensor(logits).shape)}; {len(labels)} labels need "
            f"({len(labels)},) or (N, {len(labels)})"
        )
    if not torch.isfinite(rows).all():
        raise ValueError(f"the {who}'s logits hold NaN or infinity; a softmax of them says nothing")
    return rows
