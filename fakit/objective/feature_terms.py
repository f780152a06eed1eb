"""Further terms over hidden states: of texts in place of tokens, of what blocks add, of two layers together.

All of them are `Features` in what they need, project and weigh, so that trainer, cache and YAML take them alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fakit.layer_maps import LayerMap, Pair
from fakit.losses import relational
from fakit.losses.features import mse
from fakit.losses.reduce import at_least_float32, in_full
from fakit.objective.earth_mover import EarthMover
from fakit.objective.features import At, Features
from fakit.objective.lens import Lens
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.projections import Projection
from fakit.objective.schedules import Schedule
from fakit.objective.term import normalized
from fakit.objective.units import Units
from fakit.tracing.trace import Trace

POOLS = ("mean", "first", "last")


@dataclass(init=False)
class Pooled(Features):
    """Matching of texts: each is one vector of its tokens' hidden states, as sentence embeddings are.

        x̄ = mean of the valid tokens, or the first, or the last of them        (B, T, d) -> (B, d)

    Losses of states compare a text's two vectors; losses of relations (`fakit.losses.relational`) how the batch's texts
    lie to each other: Jasper (Zhang et al. 2024) is `Pooled("cosine")`, `Pooled("similarity")` and
    `Pooled("margin_ranking")` with weights 10, 200 and 20, the latter two over Matryoshka prefixes.

    Args:
        loss, weight, projection, layer_map, shared, at_equal_width, parameters, at: see `Features`. The projection is
            that of the pooled vectors.
        pool: "mean", "first" or "last".
        prefixes: Matryoshka: the mean of the loss over the first p dimensions, for each p. Losses of relations take the
            student's first p dimensions and all of the teacher's, others the first p of both.
    """

    pool: str = "mean"
    prefixes: tuple[int, ...] = ()

    def __init__(
        self,
        loss: str | Callable = "cosine",
        weight: float | Schedule = 1.0,
        pool: str = "mean",
        prefixes: Sequence[int] = (),
        projection: Projection | None = "linear",
        layer_map: LayerMap | None = None,
        shared: bool = False,
        at_equal_width: bool = False,
        parameters: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        if pool not in POOLS:
            raise ValueError(f"Pooled(pool={pool!r}) is not known; choose one of {', '.join(map(repr, POOLS))}.")
        if not all(isinstance(p, int) and p > 0 for p in prefixes):
            raise ValueError(f"Pooled(prefixes={prefixes!r}): prefixes are numbers of dimensions above 0, as 64, 128.")
        self.pool, self.prefixes = pool, tuple(prefixes)
        super().__init__(loss, weight, projection, layer_map, shared, at_equal_width, parameters, **more)

    def count(self, batch: CountedBatch) -> Tensor:
        texts = relational.texts(self.counted(batch).sum(1))
        return texts if self._count is None or self._by_text else self._count(texts.unsqueeze(0))

    @property
    def _by_text(self) -> bool:
        """Each text is compared with itself; others stand in a row, as the tokens of a text do elsewhere."""
        return self._count is None or self._count is relational.texts

    def sides(self, student: Trace, teacher: Trace, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        ours, theirs, mask = super().sides(student, teacher, pair)
        mask = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if mask is None else mask
        ours, theirs = pooled(ours, mask, self.pool), pooled(theirs, mask.to(theirs.device), self.pool)  # (B, d)
        where = 1 if self._by_text else 0
        return ours.unsqueeze(where), theirs.unsqueeze(where), mask.any(1).unsqueeze(where)  # (B, 1, d) or (1, B, d)

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        ours, theirs, mask = self.sides(student, teacher, pair)
        ours = self.projected(ours, theirs.shape[-1], pair, mask)
        if not self.prefixes:
            return self.function(ours, theirs, mask)
        widths = ours.shape[-1] if self._widths_differ else min(ours.shape[-1], theirs.shape[-1])
        if max(self.prefixes) > widths:
            raise ValueError(
                f"Pooled(prefixes={self.prefixes}): the student's vectors have {ours.shape[-1]} dimensions, the "
                f"teacher's {theirs.shape[-1]}; leave out prefixes above {widths}."
            )
        found = [
            self.function(ours[..., :p], theirs if self._widths_differ else theirs[..., :p], mask)
            for p in self.prefixes
        ]
        return torch.stack(found).mean()


def pooled(hidden: Tensor, mask: Tensor, pool: str) -> Tensor:
    """One vector a text: the mean of its valid tokens, or the first or the last of them; 0 where it has none.

    Args:
        hidden: (B, T, d). In padding it may be anything.
        mask: bool (B, T).
        pool: "mean", "first" or "last".

    Returns:
        (B, d)
    """
    if pool == "mean":
        kept = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
        return at_least_float32(kept).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    at = mask.int().argmax(1) if pool == "first" else (places * mask).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), at].masked_fill(~mask.any(1, keepdim=True), 0.0)


class _Neighbors(Features):
    """A term over two neighboring pairs of the layer map, named by the upper one."""

    def _shares_of(self, layer_map: LayerMap) -> dict[Pair, float]:
        weights = self._weights_of(layer_map)
        if len(weights) == 1:
            raise ValueError(
                f"{type(self).__name__} compares neighboring layers of the map, and {layer_map!r} has one pair: map "
                "two layers or more, (0, 0) for the embeddings among them."
            )
        return normalized({upper: weights[upper] for _, upper in pairwise(weights)})

    def below(self, pair: Pair) -> Pair:
        """The pair before it in the map."""
        pairs = list(self._weights_of(self.place.layer_map))
        return pairs[pairs.index(pair) - 1]

    def needs(self, side: str) -> Needs:
        pairs = self.shares()
        return self._needs(self._layers(side, {*pairs, *map(self.below, pairs)}))

    def cached(self) -> Needs:
        return self._needs(self._layers("teacher", self._looked_at()))

    def both(self, student: Trace, teacher: Trace, pair: Pair):
        """`sides` of the pair below and of this one: the first two and the mask of tokens that count in both."""
        lower, upper = super().sides(student, teacher, self.below(pair)), super().sides(student, teacher, pair)
        for trace, above, under in zip((student, teacher), pair, self.below(pair), strict=True):
            if trace.encoder_layers is not None and under <= trace.encoder_layers < above:
                raise ValueError(
                    f"{type(self).__name__} compares neighboring layers, and layers {under} and {above} of "
                    f"{trace.name} are an encoder's and a decoder's: give each stack a term and a layer map of its own."
                )
        return lower, upper


@dataclass(init=False)
class Dynamics(_Neighbors):
    """Feature dynamics distillation (FDD, ACL 2025): what is added between two neighboring layers of the map.

        loss(S[s₂] - S[s₁], T[t₂] - T[t₁])        (s₁, t₁), (s₂, t₂) neighboring pairs

    It goes beside `Features`, which matches the states themselves: `terms={"dynamics": Dynamics("cosine")}`.

    Args:
        loss, weight, projection, layer_map, shared, at_equal_width, parameters, at: see `Features`; the default loss is
            that of optipfair's code. The projection is that of the difference.
    """

    def __init__(self, loss: str | Callable = "cosine", *arguments: Any, **settings: Any):
        super().__init__(loss, *arguments, **settings)

    def sides(self, student: Trace, teacher: Trace, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        lower, upper = self.both(student, teacher, pair)
        return upper[0] - lower[0], upper[1] - lower[1], upper[2]


@dataclass(init=False)
class Flow(_Neighbors):
    """Flow of solution procedure (FSP, Yim et al. 2017): which features of a layer go with which of a later one.

        mean over texts and entries of (S[s₁]ᵀ S[s₂] / n - T[t₁]ᵀ T[t₂] / n)²        over a text's n tokens, (d, d)

    As TextBrewer's `fsp_loss`; of convolutions, the original's n are pixels. Both layers of a student of another width
    go through the upper pair's projection.

    Args:
        weight, projection, layer_map, shared, at_equal_width, at: see `Features`.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        projection: Projection | None = "linear",
        layer_map: LayerMap | None = None,
        **more,
    ):
        super().__init__("mse", weight, projection, layer_map, **more)

    def count(self, batch: CountedBatch) -> Tensor:
        return relational.texts(self.counted(batch).sum(1))

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        lower, upper = self.both(student, teacher, pair)
        mask = upper[2]
        ours = [self.projected(side[0], side[1].shape[-1], pair, mask) for side in (lower, upper)]  # (B, T, d_T)
        matrices = [products(*layers, mask) for layers in (ours, [lower[1], upper[1]])]  # (B, d_T, d_T)
        return mse(*matrices, None if mask is None else mask.any(1, keepdim=True).expand(matrices[0].shape[:2]))


def products(lower: Tensor, upper: Tensor, mask: Tensor | None) -> Tensor:
    """Of each text, the mean over its tokens of lower · upperᵀ. (B, T, d), (B, T, e) -> (B, d, e)"""
    lower, upper = at_least_float32(lower), at_least_float32(upper)
    if mask is not None:
        lower, upper = (x.masked_fill(~mask.unsqueeze(-1), 0.0) for x in (lower, upper))
    counts = lower.shape[1] if mask is None else mask.sum(1)[:, None, None].clamp_min(1)
    with in_full(lower):
        return lower.mT @ upper / counts


@dataclass(init=False)
class LayerAttention(Features):
    """ALP-KD (Passban et al. 2021): a student layer learns from all of its teacher layers, most from the closest ones.

        a = softmax_t(scale · s·T[t])        T̄ = Σ_t a_t T[t]        loss(s, T̄)        token by token

    A student layer's teacher layers are those that the layer map pairs it with: `LayerMap([(1, 1), (1, 2), …])`, for
    all of them every pair. Ours: each token attends for itself (theirs: the first token of a text), the scale, and that
    no gradient goes through the attention.

    Args:
        loss, weight, projection, layer_map, shared, at_equal_width, parameters, at: see `Features`; one projection for
            each student layer.
        scale: of the products; 1/d_T unless given, since hidden states are long.
    """

    scale: float | None = None

    def __init__(
        self, loss: str | Callable = "mse", weight: float | Schedule = 1.0, scale: float | None = None, **settings: Any
    ):
        self.scale = scale
        super().__init__(loss, weight, **settings)
        if self.standardize is not None:
            raise ValueError(
                "LayerAttention mixes a student layer's teacher layers, and standardize would put each on a scale "
                "of its own; leave it out."
            )
        if self._widths_differ:
            raise ValueError(
                f"LayerAttention({loss!r}): the products of student and teacher need one width; take a loss of states."
            )

    def _grouped(self, pairs) -> dict[int, list[Pair]]:
        groups: dict[int, list[Pair]] = {}
        for pair in sorted(pairs):
            groups.setdefault(pair[0], []).append(pair)
        return groups

    def _shares_of(self, layer_map: LayerMap) -> dict[Pair, float]:
        """A student layer stands at its pair with its deepest teacher layer; its weight is that of all its pairs."""
        weights = super()._shares_of(layer_map)
        return {group[-1]: sum(weights[pair] for pair in group) for group in self._grouped(weights).values()}

    def _teachers(self, pair: Pair) -> list[int]:
        return [t for s, t in sorted(self._weights_of(self.place.layer_map)) if s == pair[0]]

    def needs(self, side: str) -> Needs:
        return self._needs(self._layers(side, self._weights_of(self.place.layer_map)))

    def cached(self) -> Needs:
        return self._needs(self._layers("teacher", self._looked_at()))

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        sides = [self.sides(student, teacher, (pair[0], t)) for t in self._teachers(pair)]
        ours, width, mask = sides[0][0], sides[0][1].shape[-1], sides[0][2]
        ours = at_least_float32(self.projected(ours, width, pair, mask))  # (B, T, d_T)
        theirs = at_least_float32(torch.stack([side[1] for side in sides]))  # (layers, B, T, d_T)
        if mask is not None:
            theirs = theirs.masked_fill(~mask.unsqueeze(-1), 0.0)
        scale = 1 / width if self.scale is None else self.scale
        attention = (scale * (ours.detach() * theirs).sum(-1, keepdim=True)).softmax(0)  # (layers, B, T, 1)
        return self.function(ours, (attention * theirs).sum(0), mask)


CLONED: tuple[At, ...] = ("queries", "keys", "values", "gate", "up", "attention", "mlp")


def activation_cloning(
    weight: float | Schedule = 0.2, layer_map: LayerMap | None = None, places: Sequence[At] = CLONED, **settings: Any
) -> dict[str, Features]:
    """Activation cloning, one half of low-rank clone (LRC, Hao et al. 2025, arXiv 2505.12781): MSE of what is inside of
    mapped blocks, each place a term of the objective's, to be given as `Objective(…, terms=activation_cloning())`.

        L = weight · Σ_places mean_j MSE(S_place[j], T_place[g(j)])

    The other half, from which the student's weights come (low-rank projections of the teacher's, trained along), is not
    here: give it a student. Ours: a projection of the student's attention and MLP outputs where widths differ, in
    place of theirs of the teacher's down; the mean over layers; queries and keys after rotary embedding, which at one
    rotation leaves their squared difference as it is.

    Args:
        weight: of each term; .2 is theirs, beside the language model's loss and a KL.
        layer_map: of all of them; the objective's unless given.
        places: see `Features(at=…)`; without "gate" for blocks that have none (BERT, GPT-2).
        settings: further ones of `Features`.

    >>> list(activation_cloning(places=("up", "mlp")))
    ['cloned_up', 'cloned_mlp']
    """
    return {f"cloned_{at}": Features("mse", weight, layer_map=layer_map, at=at, **settings) for at in places}


KINDS = {
    "pooled": Pooled,
    "dynamics": Dynamics,
    "flow": Flow,
    "layer_attention": LayerAttention,
    "earth_mover": EarthMover,
    "lens": Lens,
    "units": Units,
}
