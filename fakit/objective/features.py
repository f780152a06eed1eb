"""Feature matching: hidden states, or what is inside of a block, compared at the mapped layers (arXiv 2412.19449)."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fakit import warn_of_old_name
from fakit.layer_maps import LayerMap, Pair
from fakit.losses import features as feature_losses
from fakit.objective.loss_parameters import checked, ends
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.over_layers import OverLayers
from fakit.objective.positions import Tokens, check_tokens, common_mask, compared_tokens, kept
from fakit.objective.projections import KINDS as PROJECTIONS
from fakit.objective.projections import LeastSquares, Projection, make_projection
from fakit.objective.schedules import Schedule
from fakit.objective.standardization import KINDS as STANDARDIZATIONS
from fakit.objective.standardization import Moments, Standardization, Standardize
from fakit.tracing.trace import Trace

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
        tokens: "all", or "labeled": those with a label, and of texts without any label all, as the outputs term does
            it; of a language model that learns answers, the answers' tokens; or "later", all but the first of each
            text, where decoders keep their massive activations (`fakit.models.massive`).
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
    tokens: Tokens = "all"

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
        tokens: Tokens = "all",
        **more: Any,
    ):
        check_tokens("Features", tokens)
        self.tokens = tokens
        if at not in PLACES:
            raise ValueError(f"Features(at={at!r}) is not known; choose one of {', '.join(map(repr, PLACES))}.")
        self.at, self._kept, self.embeddings = at, PLACES[at], at == "block"
        if isinstance(loss, str) and loss in feature_losses.OLD_NAMES:
            warn_of_old_name(loss, feature_losses.OLD_NAMES[loss])
            loss = feature_losses.OLD_NAMES[loss]
        self.loss, self.weight, self.projection, self.layer_map = loss, weight, projection, layer_map
        self.shared, self.at_equal_width = shared, at_equal_width
        self.parameters = dict(parameters or {}) | more
        self._bare = chosen = checked(Features, loss, feature_losses.LOSSES, self.parameters)
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
        counted = self.counted(batch)
        return counted.sum() if self._count is None else self._count(counted.sum(1))

    def counted(self, batch: CountedBatch) -> Tensor:
        """The tokens that are compared. bool (B, T)"""
        return batch.compared(self.tokens)

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
        return ours, theirs, self._learned(common_mask(student, teacher, pair), student, ours)

    def _learned(self, mask: Tensor | None, student: Trace, like: Tensor) -> Tensor | None:
        """The mask (B, T) without tokens that are not compared."""
        return compared_tokens(self.place.name, self.tokens, student, mask, like)

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
