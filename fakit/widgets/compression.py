"""Compression by hand: a budget of parameters on a slider, and layers one takes out by a click."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets
from transformers import PreTrainedModel

from fakit.compression.importance import divergence, importance
from fakit.compression.ranks import METHODS, Plan, make_plan
from fakit.compression.spectra import Spectra
from fakit.figures import Figure, layer_prices, rank_plan
from fakit.widgets.panel import LABEL, WIDE, Panel


class RankBudget(Panel):
    """See `rank_budget`.

    Attributes:
        keep: the slider, in percent of the parameters; method: its buttons.
        plan: `Plan` of this moment, for `low_rank.compress(model, plan=budget.plan)`.
    """

    plan: Plan

    def __init__(self, spectra: Spectra, keep: float = 0.8, method: str = "bottom", lowest: float = 0.25):
        self._spectra, self._lowest = spectra, lowest
        make_plan(spectra, keep, method, lowest)  # refuses before anything is shown
        lowest_percent = next(p for p in range(1, 101) if _reachable(spectra, p / 100, lowest))
        self.keep = widgets.IntSlider(
            value=round(100 * keep),
            min=lowest_percent,
            max=100,
            description="parameters kept, %",
            continuous_update=False,
            style=LABEL,
            layout={"width": WIDE},
        )
        self.method = widgets.ToggleButtons(
            options=METHODS, value=method, description="which ranks first", style={**LABEL, "button_width": "90px"}
        )
        super().__init__([self.keep, self.method])
        for control in (self.keep, self.method):
            control.observe(self.refresh, "value")

    def draw(self) -> tuple[Figure, str]:
        """The plan at the slider's budget."""
        self.plan = make_plan(self._spectra, self.keep.value / 100, self.method.value, self._lowest)
        rows = self.plan.rows
        figure = rank_plan(rows, self.plan.before, self.plan.after)
        pairs = [row for row in rows if row.rank is not None]
        sentence = (
            f"{self.plan.before:,} → {self.plan.after:,} parameters ({self.plan.after / self.plan.before:.1%}); "
            f"{len(pairs)} of {len(rows)} weights become pairs of thin matrices"
        )
        if pairs:
            mean = sum(row.error for row in pairs) / len(pairs)
            stable = sum(row.stable_rank_weights / min(row.shape) for row in pairs) / len(pairs)
            sentence += (
                f", with a mean predicted error of {mean:.2f}; their mean stable rank is {stable:.1%} of full rank"
            )
        return figure, f"{sentence}."


def rank_budget(spectra: Spectra, keep: float = 0.8, method: str = "bottom", lowest: float = 0.25) -> RankBudget:
    """A slider for the share of parameters that stays; what it leaves of each block, and the predicted errors, follow.

    Args:
        spectra: `low_rank.spectra(model)`, or of activations `low_rank.spectra(model, batches)`; computed once.
        keep, method, lowest: where it starts; see `fakit.compression.ranks.make_plan`.

    Raises:
        ValueError: a budget that cannot be reached, with the bound; another method.

    >>> budget = rank_budget(low_rank.spectra(teacher))  # doctest: +SKIP
    >>> student = low_rank.compress(teacher, plan=budget.plan)  # doctest: +SKIP
    """
    return RankBudget(spectra, keep, method, lowest)


class LayerRemover(Panel):
    """See `layer_remover`.

    Attributes:
        buttons: layer → its button, pressed where the layer is out; `remover.buttons[3].value = True` takes it out.
        prices: {layer: cost of leaving it out alone}.
        together: cost of leaving out all that are out, None where none is.
    """

    together: float | None

    def __init__(self, teacher: PreTrainedModel, data, collator: Callable):
        self._work = (teacher, data, collator)
        self.prices = importance(teacher, "kl", data, collator)
        self._measured: dict[tuple[int, ...], float] = {(i,): price for i, price in self.prices.items()}
        self.buttons = {
            i: widgets.ToggleButton(description=f"layer {i}", tooltip=f"leave out layer {i}", layout={"width": "82px"})
            for i in self.prices
        }
        super().__init__(
            [widgets.HBox([*self.buttons.values()], layout={"flex_flow": "row wrap", "max_width": "720px"})]
        )
        for button in self.buttons.values():
            button.observe(self.refresh, "value")

    @property
    def gone(self) -> tuple[int, ...]:
        """The layers that are out, rising."""
        return tuple(i for i, button in self.buttons.items() if button.value)

    def draw(self) -> tuple[Figure, str]:
        """Prices of single layers, and what those that are out cost together, measured on the model."""
        gone = self.gone
        if gone and gone not in self._measured:
            teacher, data, collator = self._work
            (self._measured[gone],) = divergence(teacher, teacher, data, collator, [gone])
        self.together = self._measured[gone] if gone else None
        limit = max(self._measured.values())  # bars move, the axis only where it must
        figure = layer_prices(self.prices, gone, self.together, limit=limit)
        if self.together is None:
            return figure, f"All {len(self.prices)} layers are in. Press one to leave it out."
        alone = sum(self.prices[i] for i in gone)
        compared = "more than" if self.together > alone else "less than" if self.together < alone else "as much as"
        beside = f", {compared} the sum of their single prices, {alone:.3g}" if len(gone) > 1 else ""
        return figure, (
            f"Without {len(gone)} of {len(self.prices)} layers ({', '.join(map(str, gone))}) the KL to the whole model "
            f"is {self.together:.3g} nats{beside}."
        )


def layer_remover(teacher: PreTrainedModel, data, collator: Callable) -> LayerRemover:
    """A button for each layer: press it, and the model runs without it; what that costs is measured at once.

    Args:
        teacher: a transformers model of one stack, which is left as it is.
        data: encoded rows that KL is measured on; some dozens, since each press runs the model on all of them.
        collator: pads a list of rows to a batch of tensors.

    Raises:
        ValueError: a model whose layers cannot be taken out one by one; no rows.

    >>> remover = layer_remover(teacher, rows, collator)  # doctest: +SKIP
    >>> remover.buttons[3].value = True; remover.together  # doctest: +SKIP
    """
    return LayerRemover(teacher, data, collator)


def _reachable(spectra: Spectra, keep: float, lowest: float) -> bool:
    try:
        make_plan(spectra, keep, "uniform", lowest)
    except ValueError:
        return False
    return True
