"""The weights of an objective's terms, which may be set at any time."""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from numbers import Real


class Weights(MutableMapping):
    """Term weights by name. Terms that the objective does not have, and weights that are negative or not finite,
    are refused.
    """

    def __init__(self, weights: Mapping[str, float], terms: Mapping[str, object] | None = None):
        self._weights: dict[str, float] = dict.fromkeys(weights, 0.0)
        self._terms = terms or {}  # whose `weight` is this one, too
        self.update(weights)

    def __getitem__(self, name: str) -> float:
        return self._weights[name]

    def __setitem__(self, name: str, weight: float) -> None:
        if name not in self._weights:
            raise ValueError(f"no term {name!r} in this objective, so it has no weight; terms: {list(self._weights)}.")
        if not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(
                f"weight of {name!r} is {weight!r}; weights are finite numbers ≥ 0 (0 switches a term off)."
            )
        self._weights[name] = float(weight)
        if name in self._terms:
            vars(self._terms[name])["weight"] = self._weights[name]

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"terms stay; objective.weights[{name!r}] = 0 switches it off at no cost.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return repr(self._weights)
