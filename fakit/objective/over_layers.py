"""Terms over layer pairs: which pairs, and what each counts for."""

from torch import Tensor

from fakit.layer_maps import LayerMap, Pair
from fakit.objective.term import Term, normalized
from fakit.tracing.trace import Trace


class OverLayers(Term):
    """A term over layer pairs: a weighted mean of the losses at each."""

    embeddings: bool = True  # layer 0 may be mapped

    def shares(self) -> dict[Pair, float]:
        return self._shares_of(self.place.layer_map)

    def _shares_of(self, layer_map: LayerMap) -> dict[Pair, float]:
        return normalized(self._weights_of(layer_map))

    def _weights_of(self, layer_map: LayerMap) -> dict[Pair, float]:
        """The pairs of a map that the term looks at, in order, and their weights."""
        pairs = dict(zip(layer_map.pairs, layer_map.pair_weights, strict=True))
        return {pair: w for pair, w in pairs.items() if self.embeddings or min(pair) > 0}

    def compare(self, student: Trace, teacher: Trace, labels: Tensor | None) -> dict[Pair, Tensor]:
        self.place.matches.clear()
        return {pair: self.compare_pair(student, teacher, pair) for pair in self.shares()}

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        """The loss at one layer pair. ()"""
        raise NotImplementedError(f"{type(self).__name__}.compare_pair(student, teacher, pair) is not written.")

    def possible_pairs(self) -> list[Pair]:
        """All pairs that a random map may draw; of another map its pairs."""
        return self._looked_at() if self.place.layer_map.is_random else list(self.shares())

    def _looked_at(self) -> list[Pair]:
        """All pairs of the layer map, or that it may draw, that the term looks at."""
        return [pair for pair in self.place.layer_map.possible_pairs() if self.embeddings or min(pair) > 0]

    def _layers(self, side: str, pairs) -> frozenset[int]:
        index = {"student": 0, "teacher": 1}[side]
        return frozenset(pair[index] for pair in pairs)
