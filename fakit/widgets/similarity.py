"""Similarity in the hand: the estimator as a switch, the rogue dimensions under a slider.
Everything is measured before the first click.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import numpy as np

from fakit.figures import Figure, rogue_scrub, similarity_heatmap
from fakit.similarity import RogueScrub, SimilarityMatrix
from fakit.similarity.rogue import MODES
from fakit.widgets.panel import LABEL, WIDE, Panel


class EstimatorSwitch(Panel):
    """See `estimator_switch`.

    Attributes:
        buttons: `switch.buttons.value = "biased"` presses one from code.
        result: the matrix shown now.
    """

    def __init__(self, results: Mapping[str, SimilarityMatrix], map_pairs: Sequence[tuple[int, int]] | None = None):
        self.results = dict(results)
        shapes = {name: found.values.shape for name, found in self.results.items()}
        if len(shapes) < 2 or len(set(shapes.values())) > 1:
            raise ValueError(f"a switch turns between two or more matrices of the same layers; found {shapes}")
        self._pairs = [] if map_pairs is None else [tuple(pair) for pair in map_pairs]
        self._first = next(iter(self.results))
        self._at = [self._cell(pair) for pair in self._pairs]
        self.buttons = widgets.ToggleButtons(
            options=list(self.results),
            value=self._first,
            description="estimator",
            style={**LABEL, "button_width": "auto"},
        )
        super().__init__([self.buttons])
        self.buttons.observe(self.refresh, "value")

    @property
    def result(self) -> SimilarityMatrix:
        """The matrix of the estimator that is pressed."""
        return self.results[self.buttons.value]

    def _cell(self, pair: tuple[int, int]) -> tuple[int, int]:
        found = self.results[self._first]
        found[pair]  # refuses a pair of layers that are not there
        return list(found.student_numbers).index(pair[0]), list(found.teacher_numbers).index(pair[1])

    def draw(self) -> tuple[Figure, str]:
        """The heatmap of the estimator pressed, and what changes from the first one."""
        name, found = self.buttons.value, self.result
        figure = similarity_heatmap(
            found.values,
            [f"S{s}" for s in found.student_numbers],
            [f"T{t}" for t in found.teacher_numbers],
            null=found.null if found.permutations else None,
            low=found.low if found.bootstrap else None,
            high=found.high if found.bootstrap else None,
            map_pairs=self._at or None,
            title=f"CKA: {name}",
        )
        what = "the mapped pairs" if self._at else "all pairs"
        sentence = f"{name}, n = {found.n}: mean CKA of {what} {self._mean(found):.2f}"
        if name != self._first:
            change = self._mean(found) - self._mean(self.results[self._first])
            sentence += f", {change:+.2f} beside ‘{self._first}’"
        if found.permutations:
            sentence += f"; {int(found.inside_null.sum())} of {found.values.size} cells within what chance reaches"
        return figure, " ".join([sentence + ".", *found.warnings])

    def _mean(self, found: SimilarityMatrix) -> float:
        return float(np.nanmean([found.values[at] for at in self._at] if self._at else found.values))


def estimator_switch(
    results: Mapping[str, SimilarityMatrix], map_pairs: Sequence[tuple[int, int]] | None = None
) -> EstimatorSwitch:
    """Buttons for the estimator, and the heatmap of layers that it gives: null hatched, intervals on hover.

    Args:
        results: name → matrix of the same layers, the one to compare with first; `fakit.similarity.compare_estimators`
            makes them.
        map_pairs: (student layer number, teacher layer number), framed, and averaged in the sentence.

    Raises:
        ValueError: fewer than two matrices, of different layers, or a pair that is not in them.

    >>> switch = estimator_switch(compare_estimators(students, teachers, mask))  # doctest: +SKIP
    >>> switch.buttons.value = "biased, tokens pooled"  # doctest: +SKIP
    """
    return EstimatorSwitch(results, map_pairs)


class RogueScrubber(Panel):
    """See `rogue_scrubber`.

    Attributes:
        slider: how many dimensions; `scrubber.slider.value = 3` moves it from code.
        buttons: "drop" or "z-score".
    """

    def __init__(self, scrub: RogueScrub):
        self.scrub = scrub
        self._cka = {
            mode: {f"S{s} and T{t}": values[:, i].tolist() for i, (s, t) in enumerate(scrub.pairs)}
            for mode, values in scrub.cka.items()
        }
        self._shares = {name: share.tolist() for name, share in scrub.shares.items()}
        self.slider = widgets.IntSlider(
            value=0,
            min=0,
            max=scrub.largest,
            description="largest dimensions",
            continuous_update=False,
            style=LABEL,
            layout={"width": WIDE},
        )
        self.buttons = widgets.ToggleButtons(
            options=list(MODES), value=MODES[0], description="do what", style={**LABEL, "button_width": "auto"}
        )
        super().__init__([self.buttons, self.slider])
        self.slider.observe(self.refresh, "value")
        self.buttons.observe(self.refresh, "value")

    @property
    def values(self) -> dict[str, float]:
        """CKA of every pair as it is shown now: "S3 and T6" → value."""
        return {name: line[self.slider.value] for name, line in self._cka[self.buttons.value].items()}

    def draw(self) -> tuple[Figure, str]:
        """CKA and variance against the number of dimensions, with a line where the slider stands."""
        k, mode = self.slider.value, self.buttons.value
        figure = rogue_scrub(self._cka[mode], self._shares, k, mode)
        if not k:
            return (
                figure,
                "All dimensions count as they are. Move the slider: the largest ones of every layer go first.",
            )
        first = max(self._shares, key=lambda name: self._shares[name][k])
        fell = max(self._cka[mode].items(), key=lambda item: abs(item[1][k] - item[1][0]))
        said = ", ".join(str(d) for d in self.scrub.dimensions[first][:k])
        return figure, (
            f"{k} of each layer: in {first} dimension{'s' if k > 1 else ''} {said} carry "
            f"{100 * self._shares[first][k]:.1f} % of the variance. The largest change is that of {fell[0]}, "
            f"{fell[1][0]:.2f} → {fell[1][k]:.2f}."
        )


def rogue_scrubber(scrub: RogueScrub) -> RogueScrubber:
    """A slider that drops (or z-scores) the largest dimensions one by one; CKA of the pairs before and after,
    and their variance.

    Args:
        scrub: what `fakit.similarity.scrub_rogue` measured.

    >>> scrubber = rogue_scrubber(scrub_rogue(students, teachers, mask, layer_map.pairs))  # doctest: +SKIP
    >>> scrubber.slider.value = 3  # doctest: +SKIP
    >>> scrubber.values  # doctest: +SKIP
    """
    return RogueScrubber(scrub)
