"""What one evaluation of the objective gives."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fakit.layer_maps import Pair


def total(values: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, one or more."""
    first, *others = values
    return sum(others, first)


@dataclass
class Breakdown:
    """One evaluation of the objective. A term of weight 0 was not computed and is in none of the dictionaries.

    Attributes:
        total: scalar with graph, the weighted sum.
        terms: {name: scalar with graph}, before weighting.
        weighted: {name: scalar with graph}, whose sum is `total`.
        per_layer: {name: {(student layer, teacher layer): detached scalar}} for the terms that go over layers.
        heads: {(student layer, teacher layer): the teacher head each student head was compared with, (H_S,)},
            under "best-match".
    """

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    per_layer: dict[str, dict[Pair, Tensor]] = field(default_factory=dict)
    heads: dict[Pair, Tensor] = field(default_factory=dict)

    def check(self, whose: Callable[[str, list[Pair]], str] = lambda name, pairs: "") -> None:
        """Raise ValueError naming the term and the layer where a loss is NaN or infinite. Waits for the device.

        `whose`: says by term and layer pairs whose numbers they come from, "" where it does not know.
        """
        if torch.isfinite(self.total):
            return
        for name, value in self.terms.items():
            pairs = [pair for pair, v in self.per_layer.get(name, {}).items() if not torch.isfinite(v)]
            layers = [f"S{s}←T{t}" for s, t in pairs]
            if layers or not torch.isfinite(value):
                where = f" at {', '.join(layers)}" if layers else ""
                known = whose(name, pairs)
                if known.startswith("the teacher"):
                    raise ValueError(f"the {name} term is {value.item()}{where}: {known}")
                raise ValueError(
                    f"the {name} term is {value.item()}{where}. If the student's weights are finite, look at the "
                    "learning rate, at half-precision overflow (use bf16), or at a batch without any valid position."
                    + (f" Found: {known}" if known else "")
                )
        raise ValueError(
            f"the total loss is {self.total.item()} while every term is finite; weights: {list(self.weighted)}."
        )

    def detach(self) -> "Breakdown":
        """The same numbers without graph."""
        return Breakdown(
            self.total.detach(),
            {k: v.detach() for k, v in self.terms.items()},
            {k: v.detach() for k, v in self.weighted.items()},
            self.per_layer,
            self.heads,
        )

    def __str__(self) -> str:
        parts = [
            f"{name} {value.item():.4g} (weighted {self.weighted[name].item():.4g})"
            for name, value in self.terms.items()
        ]
        return f"total {self.total.item():.4g} = " + " + ".join(parts)

    def _repr_markdown_(self) -> str:
        lines = ["| term | raw | weighted | by layer |", "|---|---|---|---|"]
        for name, value in self.terms.items():
            layers = ", ".join(f"S{s}←T{t} {v.item():.3g}" for (s, t), v in self.per_layer.get(name, {}).items())
            lines.append(f"| {name} | {value.item():.4g} | {self.weighted[name].item():.4g} | {layers} |")
        return "\n".join([*lines, f"| **total** | | **{self.total.item():.4g}** | |"])
