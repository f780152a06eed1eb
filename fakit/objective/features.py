"""The four terms of arXiv 2412.19449: features, attention, outputs and task. They stay as they are made."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from fakit import warn_of_old_name
from fakit.layer_maps import LayerMap, Pair
from fakit.losses import attention as attention_losses
from fakit.losses import features as feature_losses
from fakit.losses import outputs as output_losses
from fakit.losses.fused import streamed
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.logits import ANY_VOCABULARIES, asked_of, check_vocabularies
from fakit.losses.task import REGRESSION, SEVERAL_LABELS, task_loss
from fakit.objective.breakdown import total
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.positions import aligned, common_mask, kept, predicting
from fakit.objective.projections import KINDS as PROJECTIONS
from fakit.objective.projections import LeastSquares, Projection, make_projection
from fakit.objective.schedules import Schedule, scheduled
from fakit.objective.standardization import KINDS as STANDARDIZATIONS
from fakit.objective.standardization import Moments, Standardization, Standardize
from fakit.objective.temperature import LearnedTemperature
from fakit.objective.term import Term, choose, normalized
from fakit.tracing.trace import Trace

# Those with relations are no function of two maps: the term compares them itself.
ATTENTION_LOSSES = attention_losses.LOSSES | {"relations": None, "minilm": None}
Heads = Literal["one-to-one", "group-mean", "best-match"]
HEADS: tuple[str, ...] = get_args(Heads)
At = Literal["block", "attention", "mlp", "up", "gate", "queries", "keys", "values"]
# where a trace holds them
PLACES = {
    "block": "hidden_states",
    "attention": "attention_outputs",
    "mlp": "mlp_outputs",
    "up": "mlp_ups",
    "gate": "mlp_gates",
    "queries": "queries",
    "keys": "keys",
    "values": "values",
}
INPUTS = ("queries", "keys", "values")
OF_ITS_OWN_WIDTH = ("up", "gate", *INPUTS)  # places that are not as wide as the hidden states
# What the objective itself gives a loss; everything else in its signature may be set by keyword.
GIVEN = ("student", "teacher", "mask", "temperature", "labels")


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


@dataclass(init=False)
class Features(OverLayers):
    """Feature matching over the mapped layers.

    Args:
        loss: "mse", "cosine" or another of `fakit.losses.features.LOSSES`, or any function (student, teacher, mask) of
            (B, T, d) tensors.
        weight: α.
        projection: "linear", "orthogonal" or "mlp" learns a map from the student's width to the teacher's for each pair
            whose widths differ (`fakit.objective.projections`); None forbids it. Losses that compare relations within
            each model ("gram", "cka_loss", "rkd_distance" …: `fakit.losses.relational`) never have one.
        layer_map: for this term alone; the objective's unless given.
        shared: one projection for all pairs.
        at_equal_width: a projection also where widths agree (Chen et al. 2022, arXiv 2210.15274: it helps in vision).
        parameters: the loss's own, by name, as further keywords.
        at: what is compared of a layer: "block", its output; "attention", what its attention adds to the hidden
            states, after the output projection (LoLCATs, Zhang et al. 2024, mse times 1000; MaxText); "mlp", what its
            MLP adds to them; "up" and "gate", what these projections of the MLP give; "queries", "keys" and "values",
            as its attention function receives them. Layer 0 has none of these and is left out. The last five are never
            projected: both sides are as wide, as in LRC (Hao et al. 2025, arXiv 2505.12781), which compares all seven
            (`fakit.objective.feature_terms.activation_cloning`), or the loss is one of relations.
        standardize: "dimension" or "phi_s" put the teacher's states on an even scale first
            (`fakit.objective.standardization`), by statistics that `objective.fit_standardization` gathers. A student
            without a projection goes through the same map, so that it still aims at the teacher's states.
        standardize_batches: have the trainer gather them over this many of the first training batches, before its first
            step.
    """

    loss: str | Callable = "mse"
    weight: float | Schedule = 1.0
    projection: Projection | None = "linear"
    layer_map: LayerMap | None = None
    shared: bool = False
    at_equal_width: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    at: At = "block"
    standardize: Standardize | None = None
    standardize_batches: int | None = None

    def __init__(
        self,
        loss: str | Callable = "mse",
        weight: float | Schedule = 1.0,
        projection: Projection | None = "linear",
        layer_map: LayerMap | None = None,
        shared: bool = False,
        at_equal_width: bool = False,
        parameters: Mapping[str, Any] | None = None,
        at: At = "block",
        standardize: Standardize | None = None,
        standardize_batches: int | None = None,
        **more: Any,
    ):
        if at not in PLACES:
            raise ValueError(f"Features(at={at!r}) is not known; choose one of {', '.join(map(repr, PLACES))}.")
        self.at, self._kept, self.embeddings = at, PLACES[at], at == "block"
        if isinstance(loss, str) and loss in feature_losses.OLD_NAMES:
            warn_of_old_name(loss, feature_losses.OLD_NAMES[loss])
            loss = feature_losses.OLD_NAMES[loss]
        self.loss, self.weight, self.projection, self.layer_map = loss, weight, projection, layer_map
        self.shared, self.at_equal_width = shared, at_equal_width
        self.parameters = dict(parameters or {}) | more
        self._bare = chosen = checked("Features", loss, feature_losses.LOSSES, self.parameters)
        for given in ends(self.parameters):
            if given and not callable(loss):  # what it refuses of its parameters (beta = 0), it refuses now
                chosen(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), None, **given)
        self._widths_differ = getattr(chosen, "widths_differ", False)  # see `fakit.losses.relational.relational`
        self._count = getattr(chosen, "count", None)
        if projection not in (*PROJECTIONS, None):
            known = ", ".join(map(repr, PROJECTIONS))
            raise ValueError(f"Features(projection={projection!r}) is not known; choose one of {known}, or None.")
        if at_equal_width and at in OF_ITS_OWN_WIDTH:
            raise ValueError(f"Features(at={at!r}, at_equal_width=True): what is compared there is never projected.")
        if at_equal_width and (projection is None or self._widths_differ):
            raise ValueError(
                f"Features({loss!r}, projection={projection!r}, at_equal_width=True): this one never has a "
                "projection; leave at_equal_width out, or take a loss that compares states and a projection."
            )
        self.standardize, self.standardize_batches = standardize, standardize_batches
        self._check_standardize()
        self._made = True

    @property
    def function(self) -> Callable:
        """The loss with its own parameters set, as they are in this step."""
        return partial(self._bare, **self.parameters) if self.parameters else self._bare

    def _check_standardize(self) -> None:
        name = type(self).__name__
        if self.standardize not in (*STANDARDIZATIONS, None):
            known = ", ".join(map(repr, STANDARDIZATIONS))
            raise ValueError(f"{name}(standardize={self.standardize!r}) is not known; choose one of {known}, or None.")
        if self.standardize is not None and self._widths_differ:
            raise ValueError(
                f"{name}({self.loss!r}, standardize={self.standardize!r}): this loss compares relations within each "
                "model, and only the teacher's would change; take a loss that compares states."
            )
        if self.standardize is not None and self.at in OF_ITS_OWN_WIDTH:
            raise ValueError(
                f"{name}(at={self.at!r}, standardize={self.standardize!r}): statistics are of what is as wide as the "
                "hidden states; take at='block', 'attention' or 'mlp'."
            )
        batches = self.standardize_batches
        if batches is not None and (self.standardize is None or batches < 1):
            raise ValueError(
                f"{name}(standardize={self.standardize!r}, standardize_batches={batches!r}): a number of batches, 1 or "
                "more, for a standardization; standardize='phi_s'."
            )

    def needs(self, side: str) -> Needs:
        return self._needs(self._layers(side, self.shares()))

    def _needs(self, layers: frozenset[int]) -> Needs:
        if self.at in INPUTS:
            return Needs(attentions=layers, inputs=frozenset({"queries", "keys", self.at}))  # no attention without both
        return Needs.of({self._kept: layers}, type(self).__name__)

    def count(self, batch: CountedBatch) -> Tensor:
        return batch.tokens if self._count is None else self._count(batch.mask.sum(1))

    def cached(self) -> Needs:
        return self._needs(self._layers("teacher", self.possible_pairs()))

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        ours, theirs, mask = self.sides(student, teacher, pair)
        return self.function(self.projected(ours, theirs.shape[-1], pair, mask), theirs, mask)

    def sides(self, student: Trace, teacher: Trace, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is compared at a layer pair, before any projection, (B, T, d_S) and (B, T, d_T); which of it counts."""
        ours = kept(student, self._kept, pair[0])  # (B, T, d_S)
        theirs = kept(teacher, self._kept, pair[1])  # (B, T, d_T)
        if self.at in INPUTS:  # (B, H, T, d_head)
            ours, theirs = (x.transpose(1, 2).flatten(2) for x in (ours, theirs))
        if self.at in OF_ITS_OWN_WIDTH and ours.shape[-1] != theirs.shape[-1] and not self._widths_differ:
            raise ValueError(
                f"{self.place.name} compares {self.at} at S{pair[0]}←T{pair[1]}: the student's are {ours.shape[-1]} "
                f"wide, the teacher's {theirs.shape[-1]}, and no projection is learned there. Take a student of the "
                "teacher's heads and MLP width, at='attention' or 'mlp', or a loss of relations."
            )
        if self.standardize is not None:
            standardization = self._standardization_of(pair[1], theirs)
            if not self.projects(ours.shape[-1], theirs.shape[-1]) and ours.shape == theirs.shape:
                ours = standardization(ours)
            theirs = standardization(theirs)
        return ours, theirs, common_mask(student, teacher, pair)

    def _standardization_of(self, layer: int, like: Tensor) -> Standardization:
        name, modules = self._standardization_name(layer), self.place.modules
        if name not in modules or not cast(Standardization, modules[name]).gathered:
            raise ValueError(
                f"{self.place.name} standardizes the teacher's layer {layer}, whose statistics are not there: "
                "objective.fit_standardization(teacher_traces) gathers them, and so does the trainer with "
                "standardize_batches=N, before its first step."
            )
        found = cast(Standardization, modules[name])
        if found.width != like.shape[-1]:
            raise ValueError(
                f"the standardization of the teacher's layer {layer} is {found.width} wide, the layer "
                f"{like.shape[-1]}: this objective was prepared for another teacher; make a new one."
            )
        return found

    def _standardization_name(self, layer: int) -> str:
        return f"{self.standardize}_{dict(block='T', attention='A', mlp='M')[self.at]}{layer}"  # terms share it

    def standardizations(self) -> dict[str, int]:
        """{name: teacher layer} of those that this term may look at."""
        layers = self._layers("teacher", self._looked_at()) if self.standardize is not None else ()
        return {self._standardization_name(layer): layer for layer in sorted(layers)}

    def add_moments(self, teacher: Trace, moments: dict[str, Moments], done: set[str]) -> None:
        """Add a trace to what the standardizations follow from, but for those that are `done`."""
        held = getattr(teacher, self._kept)
        for name, layer in self.standardizations().items():
            if name not in done and layer in held:
                states, mask = held[layer], teacher.layer_mask(layer)
                moments.setdefault(name, Moments(states.shape[-1], self.standardize == "phi_s")).add(
                    states.flatten(0, 1) if mask is None else states[mask]
                )
                done.add(name)

    def make_standardizations(self, widths: Mapping[str, int]) -> None:
        """The modules of these names, where they are not there."""
        for name in self.standardizations().keys() & widths.keys() - self.place.modules.keys():
            self.place.modules[name] = Standardization(str(self.standardize), widths[name])

    def projected(self, ours: Tensor, teacher_width: int, pair: Pair, mask: Tensor | None) -> Tensor:
        """The student's side in the teacher's width, where the loss needs that. (B, T, d_S) -> (B, T, d_T)"""
        if not self.projects(ours.shape[-1], teacher_width):
            return ours
        if mask is not None:  # NaN in padding must not reach the projection's gradient
            ours = ours.masked_fill(~mask.unsqueeze(-1), 0.0)
        projection = self.projection_of(pair, ours.shape[-1], teacher_width, like=ours)
        return projection(ours.to(next(projection.parameters()).dtype))

    def gather(self, student: Trace, teacher: Trace, pair: Pair, sums: dict[str, LeastSquares]) -> None:
        """Add what a pair's projection is fitted to, `Objective.fit_projections`."""
        ours, theirs, mask = self.sides(student, teacher, pair)
        if not self.projects(ours.shape[-1], theirs.shape[-1]):
            return
        name, projection = self._projection_name(pair), self.projection_of(pair, ours.shape[-1], theirs.shape[-1])
        rows = slice(None) if mask is None else mask
        sums.setdefault(name, LeastSquares(name, projection)).add(ours[rows], theirs[rows])

    def prepare(self, student_width: int, teacher_width: int) -> None:
        """One projection d_S → d_T for each pair, where there is one; for every pair that a random map may draw."""
        if self.projects(student_width, teacher_width):
            for pair in self.possible_pairs():
                self.projection_of(pair, student_width, teacher_width)
        self.make_standardizations(dict.fromkeys(self.standardizations(), teacher_width))

    def projects(self, student_width: int, teacher_width: int) -> bool:
        """Whether a projection stands between two layers of these widths."""
        if self.at in OF_ITS_OWN_WIDTH or self._widths_differ:
            return False
        return student_width != teacher_width or self.at_equal_width

    def projection_of(self, pair: Pair, d_student: int, d_teacher: int, like: Tensor | None = None) -> nn.Module:
        """The projection of a layer pair, made if it is not there.

        Raises:
            ValueError: projections are not allowed, or this one was made for other widths.
        """
        name, modules = self._projection_name(pair), self.place.modules
        if name not in modules:
            if self.projection is None:
                raise ValueError(
                    f"student layer {pair[0]} is {d_student} wide, teacher layer {pair[1]} is {d_teacher} wide, and no "
                    "projection is allowed (projection=None); use Features(..., projection='linear') or a student of "
                    "the teacher's width."
                )
            if like is not None and torch.is_grad_enabled():
                warnings.warn(
                    f"a projection {d_student} → {d_teacher} for S{pair[0]}←T{pair[1]} was made during this call; an "
                    "optimizer built earlier does not train it. Call objective.prepare(d_student, d_teacher) first, "
                    "and give the optimizer objective.parameters() too.",
                    stacklevel=6,
                )
            projection = make_projection(self.projection, d_student, d_teacher)
            modules[name] = projection if like is None else projection.to(like.device)
        projection: Any = modules[name]
        if (projection.in_features, projection.out_features) != (d_student, d_teacher):
            raise ValueError(
                f"the projection of S{pair[0]}←T{pair[1]} maps {projection.in_features} → {projection.out_features}, "
                f"and the student is {d_student} wide, the teacher {d_teacher}: this objective was prepared for other "
                "models; make a new one."
            )
        return projection

    def _projection_name(self, pair: Pair) -> str:
        if self.shared:
            return f"{self.place.name}_all"
        own = "" if self.place.name == "features" else f"{self.place.name}_"  # two terms may map one pair
        return f"{own}S{pair[0]}_T{pair[1]}"


@dataclass(init=False)
class Attention(OverLayers):
    """Attention alignment over the mapped layers (layer 0 has none and is left out).

    Args:
        loss: "kl" or "mse" of the maps; "score_mse" of the scores before the softmax (TinyBERT, Jiao et al. 2020); the
            mean KL of relations softmax(X Xᵀ/√d_r) ("relations", MiniLMv2, Wang et al. 2021: for queries, keys and
            values); the KL of the maps plus that of the values' relations ("minilm", Wang et al. 2020, for the last
            layers alone: layer_map=LayerMap([(L_S, L_T)])); or any function (student maps, teacher maps, mask) of (B,
            H, T, T) tensors. The named ones never hold a T × T map where both models hand over their queries and keys;
            a function is given the maps in full.
        weight: β.
        heads: how maps of unequal head counts are compared. "one-to-one" compares head h with head h and needs equal
            counts; "group-mean" first averages neighboring heads of the side that has more; "best-match" gives each
            student head the teacher head that it is closest to in this batch (greedily, each teacher head once while
            there are others): see `Breakdown.heads`.
        relations: which of "queries", "keys" and "values" the relations of "relations" are of.
        relation_heads: R, of "relations" and "minilm"; the largest number up to the student's heads that divides both
            widths unless given, MiniLM's own where both sides have as many heads.
        layer_map: for this term alone; the objective's unless given.
    """

    embeddings = False  # they do not attend

    loss: str | Callable = "kl"
    weight: float | Schedule = 1.0
    heads: Heads = "one-to-one"
    relations: tuple[str, ...] = ("queries", "keys", "values")
    relation_heads: int | None = None
    layer_map: LayerMap | None = None

    def __init__(
        self,
        loss: str | Callable = "kl",
        weight: float | Schedule = 1.0,
        heads: Heads = "one-to-one",
        relations: tuple[str, ...] = ("queries", "keys", "values"),
        relation_heads: int | None = None,
        layer_map: LayerMap | None = None,
    ):
        self.loss, self.weight, self.heads, self.relations = loss, weight, heads, tuple(relations)
        self.relation_heads, self.layer_map = relation_heads, layer_map
        self.function = choose("Attention", loss, ATTENTION_LOSSES)
        if heads not in HEADS:
            raise ValueError(
                f"Attention(heads={heads!r}) is not known; choose 'one-to-one', 'group-mean' or 'best-match'."
            )
        if not self.relations or not set(self.relations) <= {"queries", "keys", "values"}:
            raise ValueError(
                f"Attention(relations={self.relations!r}): relations are of 'queries', 'keys' and 'values', one or "
                "more of them."
            )
        self._made = True

    def needs(self, side: str) -> Needs:
        return Needs(attentions=self._layers(side, self.shares()), inputs=self._inputs())

    def cached(self) -> Needs:
        return Needs(attentions=self._layers("teacher", self.possible_pairs()), inputs=self._inputs())

    def _inputs(self) -> frozenset[str]:
        if self.loss == "relations":
            return frozenset(self.relations)
        return frozenset(("queries", "keys", "values") if self.loss == "minilm" else ("queries", "keys"))

    def count(self, batch: CountedBatch) -> Tensor:
        return batch.pairs if self.loss in ("mse", "score_mse") else batch.tokens

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        mask = common_mask(student, teacher, pair)
        shown = pair[0] in student.attention and pair[1] in teacher.attention
        # maps in full: a function wants them, or a family gives nothing else
        if callable(self.loss) or (self.loss in ("kl", "mse") and not shown):
            return self._compare_maps(student, teacher, pair, mask)
        ours, theirs = self._inputs_at(student, teacher, pair)
        if self.loss == "relations":
            return self._compare_relations(ours, theirs, self.relations, mask)
        heads = self._heads(pair, ours.query.shape[1], theirs.query.shape[1])
        loss, same = ("kl" if self.loss == "minilm" else self.loss), theirs
        if self.heads == "best-match":
            costs = streamed.head_costs(loss, ours, theirs, mask)
            self.place.matches[pair] = streamed.match_heads(costs)
            same = theirs.select_heads(self.place.matches[pair])
        found = streamed.streamed_loss(loss, ours, same, mask, heads)
        return found + self._compare_relations(ours, theirs, ("values",), mask) if self.loss == "minilm" else found

    def _compare_maps(self, student: Trace, teacher: Trace, pair: Pair, mask: Tensor | None) -> Tensor:
        ours, theirs = student.attention_maps(pair[0]), teacher.attention_maps(pair[1])  # (B, H, T, T)
        heads = self._heads(pair, ours.shape[1], theirs.shape[1])
        if self.heads == "best-match":
            measure = attention_losses.map_kl if callable(self.loss) else self.function
            costs = attention_losses.head_costs(measure, ours.detach(), theirs, mask)
            self.place.matches[pair] = streamed.match_heads(costs)
            theirs = theirs[:, self.place.matches[pair]]
        elif heads is not None:
            ours, theirs = attention_losses.group_mean(ours, heads), attention_losses.group_mean(theirs, heads)
        if student.causal and teacher.causal and not callable(self.loss):  # the future takes no part in a mean
            past = torch.ones(ours.shape[-2:], dtype=torch.bool, device=ours.device).tril()
            tokens = torch.ones(ours.shape[0::2], dtype=torch.bool, device=ours.device) if mask is None else mask
            mask = past & tokens[:, None, :, None] & tokens[:, None, None, :]  # (B, 1, T, T)
            if student.documents is not None:
                mask = mask & (student.documents[:, None, :, None] == student.documents[:, None, None, :])
        return self.function(ours, theirs, mask)

    def _inputs_at(self, student: Trace, teacher: Trace, pair: Pair) -> list[Any]:
        """Both sides' attention inputs; ValueError where a side shows its maps alone."""
        for trace, layer in zip((student, teacher), pair, strict=True):
            if layer in trace.maps:
                of = "scores before the softmax" if self.loss == "score_mse" else "queries, keys and values"
                raise ValueError(
                    f"{self.loss!r} is of {of}, and {trace.name} gives only its attention maps; use Attention('kl') or "
                    "Attention('mse'), or a model that uses transformers' attention interface."
                )
        return [kept(trace, "attentions", layer) for trace, layer in zip((student, teacher), pair, strict=True)]

    def _compare_relations(self, ours: AttentionInputs, theirs: AttentionInputs, of: tuple[str, ...], mask) -> Tensor:
        heads = self.relation_heads
        heads = streamed.relation_heads(ours, theirs, of) if heads is None else heads
        losses = []
        for which in of:
            sides = streamed.relation_inputs(ours, which, heads), streamed.relation_inputs(theirs, which, heads)
            losses.append(streamed.streamed_loss("kl", *sides, mask))
        return total(losses) / len(losses)

    def _heads(self, pair: Pair, student: int, teacher: int) -> int | None:
        """The number of heads that maps are averaged down to; None where heads are compared as they are."""
        if student == teacher or self.heads == "best-match":
            return None
        if self.heads == "one-to-one":
            raise ValueError(
                f"one-to-one attention alignment at S{pair[0]}←T{pair[1]}: the student has {student} heads, the "
                f"teacher {teacher}. Use Attention(..., heads='group-mean' or 'best-match'), Attention('relations'), "
                f"or a student with {teacher} heads."
            )
        return min(student, teacher)


class Softened(Term):
    """A term with a temperature, which may be set at any time."""

    temperature: float | Schedule
    settable: ClassVar[frozenset[str]] = frozenset({"temperature"})

    @property
    def tau(self) -> float | Tensor:
        """τ of this step."""
        return cast(float, self.temperature)  # a Schedule is at its number in an objective

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":
            lowest = value.lowest if isinstance(value, Schedule) else value
            if not isinstance(lowest, Real) or not 0 < float(lowest) < math.inf:
                raise ValueError(f"{type(self).__name__}(temperature={value!r}): a temperature is finite and above 0.")
        super().__setattr__(name, value)


@dataclass(init=False)
class Outputs(Softened):
    """Output-distribution matching.

    Args:
        loss: a name of `fakit.losses.outputs.LOSSES` ("forward_kl", "jsd", "dkd" …, with a table of what each is for),
            or any function (student logits, teacher logits, mask, temperature). A function that names `labels` is given
            each position's, shifted already in causal models, and the term is off without labels, as "dkd" is.
        temperature: τ > 0, a number or a `Schedule`; `objective.temperature` may be set at any time.
        weight: γ.
        vocab_size: cut both vocabularies to their first `vocab_size` entries, for families that pad the head
            differently.
        chunked: over a large vocabulary, make and compare logits a chunk of tokens at a time, where both models have a
            plain linear head and the loss is one of the named; the same number with a fraction of the memory.
            False always makes them whole.
        parameters: the loss's own, by name, as further keywords: `Outputs("jsd", beta=0.1)`. In chunks, too. Each may
            be a `Schedule`: `Outputs("taid", t=Schedule(0.4, 1.0))`.
        reversal: λ, a number or a `Schedule`: learn τ against the student, between `temperature` and `temperature +
            temperature_range` (CTKD: `fakit.objective.temperature`). Its paper: temperature 1, range 20 and
            `Schedule(0.0, 1.0, "cosine")`, there over 10 of 240 epochs. None: τ is what was set.
        temperature_range: how far above `temperature` a learned τ may go; 20 unless given.
        temperature_rate: the learning rate of a learned τ's θ, a group of its own in the trainer's optimizer, without
            weight decay; 0.01 unless given. In a loop of your own, give `objective.parameters()` to the optimizer.
    """

    loss: str | Callable = "forward_kl"
    temperature: float | Schedule = 2.0
    weight: float | Schedule = 1.0
    vocab_size: int | None = None
    chunked: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)
    reversal: float | Schedule | None = None
    temperature_range: float | None = None
    temperature_rate: float | None = None

    def __init__(
        self,
        loss: str | Callable = "forward_kl",
        temperature: float | Schedule = 2.0,
        weight: float | Schedule = 1.0,
        vocab_size: int | None = None,
        chunked: bool = True,
        parameters: Mapping[str, Any] | None = None,
        reversal: float | Schedule | None = None,
        temperature_range: float | None = None,
        temperature_rate: float | None = None,
        **more: Any,
    ):
        self.loss, self.temperature, self.weight = loss, temperature, weight
        self.vocab_size, self.chunked = vocab_size, chunked
        self.reversal, self.temperature_range, self.temperature_rate = reversal, temperature_range, temperature_rate
        self._check_reversal()
        self.parameters = dict(parameters or {}) | more
        self._bare = checked("Outputs", loss, output_losses.LOSSES, self.parameters)
        self.needs_labels = "labels" in asked_of(self._bare)  # those of each position, as "dkd" does
        for given in ends(self.parameters):
            if not callable(loss):  # what it refuses of its parameters (beta = 2), it refuses now
                output_losses.try_out(partial(self._bare, **given))
        if vocab_size is not None and loss in ANY_VOCABULARIES:
            raise ValueError(
                f"Outputs({loss!r}, vocab_size={vocab_size}): {loss} compares vocabularies of any two sizes by their "
                "sorted probabilities, and a cut would drop some; leave vocab_size out."
            )
        self._made = True

    @property
    def function(self) -> Callable:
        """The loss with its own parameters set, as they are in this step."""
        return partial(self._bare, **self.parameters) if self.parameters else self._bare

    @property
    def learns_temperature(self) -> bool:
        """True where τ is learned."""
        return self.reversal is not None

    @property
    def learning_rate(self) -> float:
        """Of a learned τ."""
        return 0.01 if self.temperature_rate is None else self.temperature_rate

    @property
    def tau(self) -> float | Tensor:
        """τ of this step; a learned one () with graph."""
        if not self.learns_temperature:
            return super().tau
        span = 20.0 if self.temperature_range is None else self.temperature_range
        return self.place.modules[self._temperature_name(self.place.name)](self.temperature, span, self.reversal)

    @staticmethod
    def _temperature_name(name: str) -> str:
        return f"{name}_temperature"

    def placed(self, name: str, layer_map: LayerMap, modules: nn.ModuleDict) -> Self:
        if self.learns_temperature:
            modules[self._temperature_name(name)] = LearnedTemperature()
        return super().placed(name, layer_map, modules)

    def _check_reversal(self) -> None:
        own = {"temperature_range": self.temperature_range, "temperature_rate": self.temperature_rate}
        for name, value in own.items():
            if value is not None and not self.learns_temperature:
                raise ValueError(
                    f"Outputs({name}={value!r}): it is of a learned temperature, and this one is not learned; "
                    "reversal=Schedule(0.0, 1.0, 'cosine') learns it."
                )
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Outputs({name}={value!r}): a finite number above 0.")
        if self.reversal is None:
            return
        if not isinstance(self.reversal, Schedule) and not 0 <= self.reversal < math.inf:
            raise ValueError(f"Outputs(reversal={self.reversal!r}): a finite number of at least 0, or a Schedule.")
        if self.loss == "logit_mse":
            raise ValueError(
                f"Outputs('logit_mse', reversal={self.reversal}): no temperature changes this loss, so that there is "
                "nothing to learn; leave reversal out, or take a divergence such as 'forward_kl'."
            )

    @property
    def in_chunks(self) -> bool:
        """True where the loss can be made a chunk of tokens at a time."""
        return self.chunked and not callable(self.loss)

    def needs(self, side: str) -> Needs:
        return Needs(logits=True, in_chunks=self.in_chunks)

    def count(self, batch: CountedBatch) -> Tensor:
        return batch.labeled_positions if self.needs_labels else batch.positions

    def compare(self, student: Trace, teacher: Trace, labels: Tensor | None) -> Tensor:
        ours, theirs = student.logits, teacher.logits  # (B, C) or (B, T, V)
        if ours is None or theirs is None:
            side = "student" if ours is None else "teacher"
            raise ValueError(
                f"output matching needs logits, and the {side}'s trace has none; capture(..., logits=True)."
            )
        check_vocabularies(ours.shape[-1], theirs.shape[-1], self.vocab_size, self.loss)
        if self.vocab_size is not None:
            ours, theirs = ours[..., : self.vocab_size], theirs[..., : self.vocab_size]
        mask = None
        problem = problem_type(student, teacher, ours, labels)
        if not callable(self.loss) and self.loss != "logit_mse":
            check_distribution(self.loss, problem, ours.shape[-1])
            if problem == SEVERAL_LABELS:
                ours, theirs = output_losses.bernoulli(ours), output_losses.bernoulli(theirs)  # (B, C, 2)
                return self.function(ours, theirs, None, temperature=self.tau)
        if ours.dim() == 3 and self.loss in ANY_VOCABULARIES:
            ours, theirs, mask = aligned(student, teacher, labels, ours, theirs)
        elif ours.dim() == 3:
            mask = predicting(student, teacher, labels, ours)
            if student.causal:
                ours, theirs = ours[:, :-1], theirs[:, :-1]
                labels = None if labels is None else labels[:, 1:]
        given = {"labels": labels} if self.needs_labels else {}
        return self.function(ours, theirs, mask, temperature=self.tau, **given)


@dataclass(init=False)
class Task(Term):
    """The task's own loss on the labels: cross-entropy (labels of -100 are left out),
    or mean squared error for one regression output.

    Args:
        weight: δ.
    """

    needs_labels = True

    weight: float | Schedule = 1.0

    def __init__(self, weight: float | Schedule = 1.0):
        self.weight = weight
        self._made = True

    def needs(self, side: str) -> Needs:
        return Needs(logits=True, in_chunks=True) if side == "student" else Needs()

    def count(self, batch: CountedBatch) -> Tensor:
        labels = batch.labels
        assert labels is not None, "without labels the term is off"
        return ((labels != -100) & ~labels.isnan()).sum()

    def compare(self, student: Trace, teacher: Trace | None, labels: Tensor) -> Tensor:
        if student.logits is None:
            raise ValueError(
                "the task's loss needs logits, and the student's trace has none; capture(..., logits=True)."
            )
        return task_loss(student.logits, labels, student.causal, student.problem_type)


def checked(term: str, loss: str | Callable, known: Mapping[str, Callable], parameters: Mapping) -> Callable:
    """The function of a loss, which takes these parameters.

    Raises:
        ValueError: a loss that is not known, or a parameter that is not in its signature.
    """
    function = choose(term, loss, known)
    if not parameters:
        return function
    signature = inspect.signature(function).parameters
    allowed = [name for name, p in signature.items() if name not in GIVEN and p.kind is not p.VAR_KEYWORD]
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    unknown = [name for name in parameters if name in GIVEN or (name not in allowed and not anything)]
    if unknown:
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", "the function")
        raise ValueError(
            f"{term}({name!r}, {unknown[0]}={parameters[unknown[0]]!r}): {name} has no parameter {unknown[0]!r}; it "
            f"has {', '.join(allowed) or 'none of its own'}, and {term} takes {', '.join(_own_settings(term))}."
        )
    return function


def ends(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A loss's own parameters as they are at first and at last, where one of them is a Schedule."""
    if not scheduled(parameters):
        return [dict(parameters)]
    sides = ("start_value", "end_value")
    return [{n: getattr(v, side) if scheduled(v) else v for n, v in parameters.items()} for side in sides]


def _own_settings(term: str) -> list[str]:
    made = {"Features": Features, "Outputs": Outputs}[term]
    return [name for name in inspect.signature(made).parameters if name not in ("parameters", "more")]


def problem_type(student: Trace, teacher: Trace, logits: Tensor, labels: Tensor | None) -> str | None:
    """What logits mean: as the models' configurations say; where they do not,
    as their labels do (the rule of transformers).

    Raises:
        ValueError: the two models' logits mean different things.
    """
    if logits.dim() != 2:
        return None
    stated = {trace.problem_type for trace in (student, teacher)} - {None}
    if len(stated) == 2:
        raise ValueError(
            f"the student's problem_type is {student.problem_type}, the teacher's {teacher.problem_type}: their logits "
            "mean different things and cannot be compared. Give both configurations one problem_type, or leave the "
            "output term out (outputs=None)."
        )
    if stated:
        return stated.pop()
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape and labels.shape[1] > 1
    return SEVERAL_LABELS if several else None


def check_distribution(loss: str, problem: str | None, classes: int) -> None:
    """Raise ValueError where a divergence of distributions is asked of numbers that are none."""
    if problem == SEVERAL_LABELS:
        if loss in output_losses.ONE_OF_MANY:
            raise ValueError(
                f"{loss} looks at which of many classes is meant, and with several labels a text each label is yes or "
                "no by itself; use Outputs('forward_kl')."
            )
        return
    if classes == 1:
        raise ValueError(
            f"{loss} over a single output is 0 whatever the models say (softmax of one number is 1); "
            "for regression use Outputs('logit_mse')."
        )
    if problem == REGRESSION:
        raise ValueError(
            f"{loss} compares distributions, and {classes} outputs of a regression (problem_type) are none; use "
            "Outputs('logit_mse')."
        )
