"""What a trainer logs of the objective: means of its terms since the last log, its weights and temperatures."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fakit.objective.breakdown import Breakdown
from fakit.objective.objective import Objective


class Logged:
    """The steps since the last log.

    Attributes:
        sums: {term: (sum, number of steps that had it)}, sums on the device, so that nothing waits for them.
        numbers: weights and temperatures of the last step; a callback may set others before the log.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        self.numbers: dict[str, float | Tensor] = {}

    def add(self, objective: Objective, breakdown: Breakdown) -> None:
        """Count a micro-batch."""
        self.numbers = _numbers(objective)
        for name, value in _flat(breakdown, _changing(objective)).items():
            total, steps = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, steps + 1

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What is logged now; the sums begin anew.

        Args:
            gather: puts the processes' tensors one after another along the first dimension.
        """
        means = torch.stack([total / steps for total, steps in self.sums.values()])  # (terms and layer pairs,)
        means = gather(means.unsqueeze(0)).mean(0)  # over the processes
        found = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums = {}
        return found | {name: x.item() if isinstance(x, Tensor) else x for name, x in self.numbers.items()}


def _flat(breakdown: Breakdown, changing: Iterable[str]) -> dict[str, Tensor]:
    """What is averaged for the log; weighted terms only where the weight of one is another in each step."""
    layers = {f"{n}/S{s}_T{t}": v for n, pairs in breakdown.per_layer.items() for (s, t), v in pairs.items()}
    weighted = {f"weighted/{name}": breakdown.weighted[name] for name in changing if name in breakdown.weighted}
    return {**breakdown.terms, **layers, **weighted}


def _changing(objective: Objective) -> Iterable[str]:
    """The terms whose weight is another in each step."""
    return objective.weights.schedules if objective.balancing is None else objective.terms


def _numbers(objective: Objective) -> dict[str, float | Tensor]:
    """Weights and temperatures of this step, as they are logged; of balanced weights and learned temperatures what they
    come to.
    """
    taus = objective.taus
    values = list(dict.fromkeys(taus.values()))  # a learned one is like no other
    taus = {"temperature": values[0]} if len(values) == 1 else {f"temperature/{n}": t for n, t in taus.items()}
    weights: dict[str, Any] = dict(objective.weights)
    weights |= {name: weights[name] * factor for name, factor in objective.factors.items()}
    return {f"weight/{name}": weight for name, weight in weights.items()} | taus
