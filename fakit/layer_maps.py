"""Layer maps: which teacher layer teaches which student layer.

Layers are numbered as everywhere in the kit: 0 is the output of the embeddings, i = 1…L the output of block i.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product
from numbers import Integral

import torch
from torch import Tensor

Pair = tuple[int, int]  # student layer, teacher layer
Depths = int | Sequence[int]  # of a model, or of an encoder-decoder's encoder and decoder
# The maps that follow from depths alone, by their names: what `LayerMap.named` and a configuration know.
STRATEGIES = ("uniform", "last", "first", "skip", "reverse", "all_to_one", "top", "every", "random", "none")


class WeightMatrix(Tensor):
    """Weights by layer number: `weights[1, 2]` is the weight of student layer 1 on teacher layer 2. (S+1, T+1)

    As small as the pairs allow; call it with the models' depths, `weights(3, 6)`, for the matrix of exactly (3+1, 6+1).
    """

    def __call__(self, student_layers: int, teacher_layers: int) -> Tensor:
        full = torch.zeros(student_layers + 1, teacher_layers + 1)
        rows, columns = self.shape
        if rows > student_layers + 1 or columns > teacher_layers + 1:
            raise ValueError(
                f"the map reaches student layer {rows - 1} and teacher layer {columns - 1}; "
                f"asked for models of {student_layers} and {teacher_layers} layers. Make the map for these depths."
            )
        full[:rows, :columns] = self.as_subclass(Tensor)
        return full


class LayerMap:
    """Pairs (student layer, teacher layer), each with a weight (1 unless given).

    Args:
        pairs: the pairs, in any order; one student layer may have several teacher layers. They are kept sorted.
        weights: one finite weight ≥ 0 a pair, their sum above 0. A loss over the map is the weighted mean over its
            pairs.
        name: shown in figures and tables.

    Raises:
        ValueError: a pair that is not two whole numbers ≥ 0, a pair given twice, weights of another number or sign.

    >>> LayerMap.uniform(3, 6)
    LayerMap([(1, 2), (2, 4), (3, 6)], name='uniform')
    """

    def __init__(self, pairs: Iterable[Sequence[int]], weights: Iterable[float] | None = None, name: str = "custom"):
        pairs = [tuple(pair) for pair in pairs]
        for pair in pairs:
            if len(pair) != 2 or any(isinstance(i, bool) or not isinstance(i, Integral) or i < 0 for i in pair):
                raise ValueError(
                    f"a layer map holds pairs (student layer, teacher layer) of whole numbers ≥ 0; found {pair!r}. "
                    "0 is the embeddings, 1 the first block."
                )
        pairs = [(int(s), int(t)) for s, t in pairs]  # NumPy's whole numbers too
        if len(set(pairs)) != len(pairs):
            twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
            raise ValueError(f"pairs given twice: {twice}. Give each pair once, and its importance as a weight.")
        values = [1.0] * len(pairs) if weights is None else [float(w) for w in weights]
        if len(values) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs but {len(values)} weights; give one weight a pair.")
        if any(not 0 <= w < math.inf for w in values) or (pairs and not sum(values) > 0):
            raise ValueError(f"pair weights must be finite and ≥ 0 with a sum above 0; found {values}.")
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])
        self.pairs: list[tuple[int, int]] = [pairs[i] for i in order]
        self.pair_weights: list[float] = [values[i] for i in order]
        self.name = name
        self._redraw = None  # random(): depths and seed, so that every epoch can draw anew

    # -- strategies: S student layers, T teacher layers -----------------------------------------------------------
    # Depths are numbers, or for encoder-decoders lists of two: encoder and decoder, [2, 2]. Layers are counted through
    # both, and each stack is mapped by itself: an encoder's layers and a decoder's work on different tokens.

    @classmethod
    def uniform(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """Evenly spaced, last on last: j ↦ round(j·T/S). The default; TinyBERT (Jiao et al. 2020).

        >>> LayerMap.uniform([2, 1], [12, 6]).pairs  # an encoder of 2 layers from 12, a decoder of 1 from 6
        [(1, 6), (2, 12), (3, 18)]
        """
        stacks = _depths(student_layers, teacher_layers)
        return cls(_stacked(stacks, lambda S, T: [(j, _spaced(j, S, T)) for j in range(1, S + 1)]), name="uniform")

    @classmethod
    def last(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """The teacher's last layers: j ↦ T - S + j."""
        stacks = _depths(student_layers, teacher_layers, name="last")
        return cls(_stacked(stacks, lambda S, T: [(j, T - S + j) for j in range(1, S + 1)]), name="last")

    @classmethod
    def first(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """The teacher's first layers: j ↦ j."""
        stacks = _depths(student_layers, teacher_layers, name="first")
        return cls(_stacked(stacks, lambda S, T: [(j, j) for j in range(1, S + 1)]), name="first")

    @classmethod
    def skip(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """PKD's skip: as uniform, the student's last layer left to the outputs. Patient KD (Sun et al. 2019)."""
        pairs = cls.uniform(student_layers, teacher_layers).pairs[:-1]
        if not pairs:
            raise ValueError(
                f"skip leaves the last of {_shown(_listed(student_layers))} student layers out and nothing remains; "
                "use LayerMap.uniform."
            )
        return cls(pairs, name="skip")

    @classmethod
    def reverse(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """Uniform, upside down: j ↦ uniform(S + 1 - j). A control that should hurt if the order of layers matters."""
        stacks = _depths(student_layers, teacher_layers)
        upside_down = _stacked(stacks, lambda S, T: [(j, _spaced(S + 1 - j, S, T)) for j in range(1, S + 1)])
        return cls(upside_down, name="reverse")

    @classmethod
    def all_to_one(cls, student_layers: Depths, teacher_layers: Depths, teacher_layer: int | None = None) -> "LayerMap":
        """Every student layer on one teacher layer (the last unless given; of each stack its last)."""
        stacks = _depths(student_layers, teacher_layers)
        T = sum(theirs for _, theirs in stacks)
        if teacher_layer is not None and len(stacks) > 1:
            raise ValueError(
                f"teacher layer {teacher_layer} is of one stack, and the models have {len(stacks)}, whose layers work "
                "on different tokens; leave teacher_layer out, or give the pairs themselves."
            )
        if teacher_layer is not None and not 0 <= teacher_layer <= T:
            raise ValueError(
                f"teacher layer {teacher_layer} asked of a {T}-layer teacher; it has 0 (embeddings) to {T}."
            )
        onto = {T: T if teacher_layer is None else teacher_layer for _, T in stacks}
        pairs = _stacked(stacks, lambda S, T: [(j, onto[T]) for j in range(1, S + 1)])
        return cls(pairs, name="all_to_one")

    @classmethod
    def top(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """The last layer on the last, of each stack, and nothing else. MiniLM (Wang et al. 2020), DistilBERT's cosine.

        >>> LayerMap.top(3, 6).pairs
        [(3, 6)]
        """
        return cls(_stacked(_depths(student_layers, teacher_layers), lambda S, T: [(S, T)]), name="top")

    @classmethod
    def every(cls, student_layers: Depths, teacher_layers: Depths) -> "LayerMap":
        """Every student layer on every teacher layer of its stack, for a term that weighs them itself
        (`fakit.objective.feature_terms.LayerAttention`). ALP-KD (Passban et al. 2021).

        >>> LayerMap.every(1, 3).pairs
        [(1, 1), (1, 2), (1, 3)]
        """
        stacks = _depths(student_layers, teacher_layers)
        return cls(_stacked(stacks, lambda S, T: product(range(1, S + 1), range(1, T + 1))), name="every")

    @classmethod
    def random(cls, student_layers: Depths, teacher_layers: Depths, seed: int | str = 0) -> "LayerMap":
        """S teacher layers drawn without return, in rising order, anew each epoch. RAIL-KD (Haidar et al. 2022).

        `for_epoch(e)` gives epoch e's draw; the trainer asks for it at every epoch's start.
        """
        stacks = _depths(student_layers, teacher_layers, name="random")
        draw = random.Random(f"fakit {seed}")
        drawn = _stacked(stacks, lambda S, T: enumerate(sorted(draw.sample(range(1, T + 1), S)), 1))
        layer_map = cls(drawn, name="random")
        layer_map._redraw = (student_layers, teacher_layers, seed)
        return layer_map

    @classmethod
    def none(cls, student_layers: Depths | None = None, teacher_layers: Depths | None = None) -> "LayerMap":
        """No pairs: the control without any layer matching. Depths are accepted,
        so that it stands in for any strategy.
        """
        return cls([], name="none")

    @classmethod
    def named(
        cls, given: str | Iterable[Sequence[int]], student_layers: Depths, teacher_layers: Depths, seed: int | str = 0
    ) -> "LayerMap":
        """The map of a strategy's name (`STRATEGIES`), as a configuration says it, or of explicit pairs.

        Args:
            given: "uniform", "last" …, or pairs (student layer, teacher layer).
            seed: of a random map.

        Raises:
            ValueError: no strategy of this name, a map that does not fit the depths.

        >>> LayerMap.named("last", 2, 4).pairs
        [(1, 3), (2, 4)]
        """
        if not isinstance(given, str):
            layer_map = cls(given)
        elif given not in STRATEGIES:
            raise ValueError(f"layer map {given!r} is not known; choose one of {', '.join(STRATEGIES)}, or give pairs.")
        elif given == "random":
            layer_map = cls.random(student_layers, teacher_layers, seed=seed)
        else:
            layer_map = getattr(cls, given)(student_layers, teacher_layers)
        layer_map.check(student_layers, teacher_layers)
        return layer_map

    @classmethod
    def from_similarity(cls, matrix, method: str = "monotone") -> "LayerMap":
        """The map with the largest summed similarity, one teacher layer for each student layer 1…S.

        Args:
            matrix: (S+1) × (T+1), rows and columns by layer number; row and column 0 (embeddings) are not mapped.
            method: "monotone" keeps the order of layers, strictly rising (dynamic program); "assignment" does not
                (Hungarian, each teacher layer at most once).

        Raises:
            ValueError: a matrix that is not two-dimensional, holds NaN, or has more student than teacher layers.
        """
        scores = _scores(matrix, "from_similarity")
        _depths(*scores.shape, name=f"a {method} map")
        if method == "monotone":
            pairs = _best_monotone(scores.tolist())
        elif method == "assignment":
            from scipy.optimize import linear_sum_assignment

            pairs = list(zip(*linear_sum_assignment(scores.numpy(), maximize=True), strict=True))
        else:
            raise ValueError(f"method {method!r} is not known; choose 'monotone' or 'assignment'.")
        return cls([(int(s) + 1, int(t) + 1) for s, t in pairs], name=f"similarity ({method})")

    @classmethod
    def emd(
        cls,
        similarity,
        student_weights: Sequence[float] | None = None,
        teacher_weights: Sequence[float] | None = None,
        *,
        cost: bool = False,
    ) -> "LayerMap":
        """The many-to-many map of the earth mover's distance: each layer has a mass,
        and the cheapest flow moves it all.

        Every student layer learns from the teacher layers that its mass flows to, every teacher layer is taught to
        someone: min Σ F_st · D_st with Σ_t F_st = student_weights_s, Σ_s F_st = teacher_weights_t; the pairs' weights
        are F (sum 1). BERT-EMD (Li et al. 2020), whose D is the MSE of the layers; of a similarity, D = 1 − similarity.

        Args:
            similarity: (S+1) × (T+1), rows and columns by layer number; row and column 0 (embeddings) are not mapped.
            student_weights: S masses ≥ 0, equal unless given; scaled to sum 1.
            teacher_weights: T masses ≥ 0, likewise.
            cost: the matrix holds costs (MSE, distances), which are to be small.

        Raises:
            ValueError: a matrix that is no matrix or holds NaN, or masses of another number or sign.
        """
        from scipy.optimize import linprog

        values = _scores(similarity, "emd")
        S, T = values.shape
        distances = values if cost else 1 - values
        masses = [_masses(student_weights, S, "student"), _masses(teacher_weights, T, "teacher")]
        eye = torch.eye
        rows = torch.cat([eye(S).repeat_interleave(T, 1), eye(T).repeat(1, S)])  # of the flow (S, T), row by row
        found = linprog(distances.flatten().numpy(), A_eq=rows.numpy(), b_eq=torch.cat(masses).numpy(), method="highs")
        flow = torch.as_tensor(found.x).view(S, T)
        pairs = (flow > 1e-9).nonzero().tolist()
        return cls([(s + 1, t + 1) for s, t in pairs], [float(flow[s, t]) for s, t in pairs], name="emd")

    # -- what one asks of a map -----------------------------------------------------------------------------------

    @property
    def student_layers(self) -> list[int]:
        """The student layers that take part, in rising order."""
        return sorted({s for s, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """The teacher layers that take part, in rising order."""
        return sorted({t for _, t in self.pairs})

    @property
    def weights(self) -> WeightMatrix:
        """The (student, teacher) matrix of pair weights, by layer number; 0 where no pair is. See `WeightMatrix`."""
        rows, columns = (max((pair[side] for pair in self.pairs), default=-1) + 1 for side in (0, 1))
        matrix = torch.zeros(rows, columns)
        for (s, t), weight in zip(self.pairs, self.pair_weights, strict=True):
            matrix[s, t] = weight
        return matrix.as_subclass(WeightMatrix)

    def is_monotone(self) -> bool:
        """True when deeper student layers never learn from shallower teacher layers."""
        return all(t <= u for (_, t), (_, u) in pairwise(self.pairs))

    def check(self, student_layers: Depths, teacher_layers: Depths) -> None:
        """Raise ValueError when a pair names a layer that one of the models does not have,
        or an encoder's and a decoder's.

        Args:
            student_layers, teacher_layers: depths; of encoder-decoders those of encoder and decoder, [2, 2].
        """
        ours, theirs = _listed(student_layers), _listed(teacher_layers)
        fits = f"LayerMap.uniform({_shown(ours)}, {_shown(theirs)}) fits."
        for pair in self.pairs:
            for side, asked, depths in (("student", pair[0], ours), ("teacher", pair[1], theirs)):
                if asked > sum(depths):
                    raise ValueError(
                        f"layer {asked} asked of a {sum(depths)}-layer {side} (pair {pair} of {self!r}); the student "
                        f"has layers 0…{sum(ours)}, the teacher 0…{sum(theirs)}. {fits}"
                    )
            if len(ours) == len(theirs) == 2 and (pair[0] > ours[0]) != (pair[1] > theirs[0]):
                stacks = [
                    "decoder" if layer > encoder else "encoder"
                    for layer, encoder in zip(pair, (ours[0], theirs[0]), strict=True)
                ]
                raise ValueError(
                    f"pair {pair} of {self!r} matches the student's {stacks[0]} with the teacher's {stacks[1]}, which "
                    f"work on different tokens: the student has {ours[0]} encoder and {ours[1]} decoder layers, the "
                    f"teacher {theirs[0]} and {theirs[1]}, counted through. Map each stack by itself: {fits}"
                )

    def for_epoch(self, epoch: int) -> "LayerMap":
        """The map of this epoch: a fresh draw for `random`, itself for every other map."""
        if self._redraw is None:
            return self
        S, T, seed = self._redraw
        drawn = LayerMap.random(S, T, seed=seed if epoch == 0 else f"{seed}, epoch {epoch}")
        drawn._redraw = self._redraw
        return drawn

    @property
    def is_random(self) -> bool:
        """True when every epoch draws the map anew."""
        return self._redraw is not None

    def possible_pairs(self) -> list[tuple[int, int]]:
        """Every pair of this map in any epoch: a random map's are all that it may draw."""
        if self._redraw is None:
            return self.pairs
        pairs, ours, theirs = [], 0, 0
        for S, T in _depths(*self._redraw[:2]):
            pairs += [(ours + s, theirs + t) for s in range(1, S + 1) for t in range(s, T - S + s + 1)]
            ours, theirs = ours + S, theirs + T
        return pairs

    def __iter__(self):
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __eq__(self, other) -> bool:
        if not isinstance(other, LayerMap):
            return NotImplemented
        return (self.pairs, self.pair_weights) == (other.pairs, other.pair_weights)

    def __hash__(self) -> int:
        return hash((tuple(self.pairs), tuple(self.pair_weights)))

    def __repr__(self) -> str:
        weights = "" if len(set(self.pair_weights)) < 2 else f", weights={self.pair_weights}"
        return f"LayerMap({self.pairs}{weights}, name={self.name!r})"

    def __str__(self) -> str:
        return ", ".join(f"S{s} ← T{t}" for s, t in self.pairs) or "no layer is matched"

    def _repr_markdown_(self) -> str:
        return f"**{self.name}**: {self}"


def _listed(layers: Depths) -> list[int]:
    return list(layers) if isinstance(layers, Sequence) else [layers]


def _shown(depths: list[int]) -> str:
    return str(depths if len(depths) > 1 else depths[0])


def _depths(student_layers: Depths, teacher_layers: Depths, name: str | None = None) -> list[tuple[int, int]]:
    """(student layers, teacher layers) of each stack. `name`:
    of a strategy that gives each student layer a teacher layer of its own.
    """
    ours, theirs = _listed(student_layers), _listed(teacher_layers)
    if not all(isinstance(depth, int) and depth >= 1 for depth in (*ours, *theirs)):
        raise ValueError(
            f"depths are whole numbers ≥ 1 (blocks, embeddings not counted); found student {student_layers!r}, teacher "
            f"{teacher_layers!r}."
        )
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"the student has {len(ours)} stacks of layers ({_shown(ours)}), the teacher {len(theirs)} "
            f"({_shown(theirs)}), and each stack is mapped by itself; give the depths of encoder and decoder of both."
        )
    for S, T in zip(ours, theirs, strict=True):
        if name is not None and S > T:
            raise ValueError(
                f"{name} gives each of {S} student layers its own teacher layer, and the teacher has {T}; "
                "use LayerMap.uniform, which may use a layer twice."
            )
    return list(zip(ours, theirs, strict=True))


def _stacked(stacks: list[tuple[int, int]], pairs_of: Callable[[int, int], Iterable[Pair]]) -> list[Pair]:
    """Pairs of a strategy, stack by stack. `pairs_of(S, T)`: those of one stack, its layers counted from 1."""
    pairs, ours, theirs = [], 0, 0
    for S, T in stacks:
        pairs += [(ours + s, theirs + t) for s, t in pairs_of(S, T)]
        ours, theirs = ours + S, theirs + T
    return pairs


def _scores(matrix, asked_by: str) -> Tensor:
    """The mapped part (S, T) of a matrix by layer number; ValueError where there is none, or a number is missing."""
    scores = torch.as_tensor(matrix, dtype=torch.float64)
    if scores.dim() != 2 or min(scores.shape) < 2:
        raise ValueError(
            f"{asked_by} wants a matrix (S+1) × (T+1) with the embeddings as row and column 0; found "
            f"{tuple(scores.shape)}."
        )
    if not torch.isfinite(scores[1:, 1:]).all():
        where = [tuple(i + 1 for i in index) for index in (~torch.isfinite(scores[1:, 1:])).nonzero().tolist()]
        raise ValueError(
            f"the similarity matrix holds NaN or inf at (student, teacher) {where}; measure on more sequences first."
        )
    return scores[1:, 1:]


def _masses(weights: Sequence[float] | None, count: int, side: str) -> Tensor:
    masses = torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if masses.shape != (count,) or not (torch.isfinite(masses) & (masses >= 0)).all() or not masses.sum() > 0:
        raise ValueError(
            f"emd wants {count} finite {side} masses ≥ 0, one a layer 1…{count}, with a sum above 0; found {weights!r}."
        )
    return masses.double() / masses.sum()


def _spaced(j: int, S: int, T: int) -> int:
    """round(j·T/S), halves up, at least 1: exact in whole numbers, where round() would go to the even neighbor."""
    return max(1, (2 * j * T + S) // (2 * S))


def _best_monotone(scores: list[list[float]]) -> list[tuple[int, int]]:
    """Strictly rising t(0) < t(1) < … with the largest Σ scores[s][t(s)]: dynamic program, O(S·T)."""
    S, T = len(scores), len(scores[0])
    best = [[float("-inf")] * (T + 1) for _ in range(S + 1)]  # best[s][t]: first s rows within the first t columns
    best[0] = [0.0] * (T + 1)
    for s in range(1, S + 1):
        for t in range(s, T + 1):
            best[s][t] = max(best[s][t - 1], best[s - 1][t - 1] + scores[s - 1][t - 1])
    pairs, t = [], T
    for s in range(S, 0, -1):
        while t > s and best[s][t] == best[s][t - 1]:
            t -= 1
        pairs.append((s - 1, t - 1))
        t -= 1
    return pairs[::-1]
