"""The weights of an objective's terms, which may be set at any time."""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from numbers import Real
from typing import cast

from fakit.objective.schedules import Schedule
from fakit.objective.term import Term


class Weights(MutableMapping):
    """Term weights by name: the numbers of this step. Each may be set to a number or a `Schedule`.

    Terms that the objective does not have, and weights that are negative or not finite, are refused.
    """

    def __init__(self, terms: Mapping[str, Term]):
        self._terms = terms
        self.update({name: term.written("weight") for name, term in terms.items()})

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weights that change with the step."""
        written = {name: term.written("weight") for name, term in self._terms.items()}
        return {name: weight for name, weight in written.items() if isinstance(weight, Schedule)}

    def __getitem__(self, name: str) -> float:
        return cast(float, self._terms[name].weight)  # a Schedule is at its number in an objective

    def __setitem__(self, name: str, weight: float | Schedule) -> None:
        if name not in self._terms:
            raise ValueError(f"no term {name!r} in this objective, so it has no weight; terms: {list(self._terms)}.")
        self._terms[name].write("weight", check_weight(name, weight))

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"terms stay; objective.weights[{name!r}] = 0 switches it off at no cost.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def __repr__(self) -> str:
        return repr(dict(self))


def check_weight(name: str, weight: object) -> float | Schedule:
    """A term's weight. Raises ValueError for a number that is negative or not finite, and for what is no number."""
    if isinstance(weight, Schedule):
        return weight
    if not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
        raise ValueError(
            f"weight of {name!r} is {weight!r}; weights are finite numbers ≥ 0 (0 switches a term off), or a Schedule "
            "of them."
        )
    return float(weight)
