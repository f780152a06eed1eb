"""The multi-task loss of arXiv 2412.19449: feature matching, attention alignment and output matching, beside the task loss.

    L = α L_features + β L_attention + γ L_outputs + δ L_task

Each term is optional, each weight may change at any time, and each call returns a breakdown by term and by layer pair.
"""

import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakit.layer_maps import LayerMap
from fakit.losses import attention as attention_losses
from fakit.losses import features as feature_losses
from fakit.losses import outputs as output_losses
from fakit.losses.reduce import at_least_float32

Pair = tuple[int, int]


@dataclass
class Features:
    """Feature matching over the mapped layers.

    Args:
        loss: "mse", "cosine", "normalised_mse", "layernorm_mse", or any function (student, teacher, mask) of (B, T, d) tensors.
        weight: α.
        projection: "linear" learns a linear map from the student's width to the teacher's for each mapped pair whose widths
            differ; None forbids it. Pairs of one width never have one.
        layer_map: for this term alone; the objective's unless given.
    """

    loss: str | Callable = "mse"
    weight: float = 1.0
    projection: str | None = "linear"
    layer_map: LayerMap | None = None

    def __post_init__(self):
        self.function = _choose("Features", self.loss, feature_losses.LOSSES)
        if self.projection not in ("linear", None):
            raise ValueError(f"Features(projection={self.projection!r}) is not known; choose 'linear' or None.")


@dataclass
class Attention:
    """Attention alignment over the mapped layers (layer 0 has none and is left out).

    Args:
        loss: "kl", "mse", or any function (student maps, teacher maps, mask) of (B, H, T, T) tensors.
        weight: β.
        heads: "one-to-one" compares head h with head h and needs equal counts; "group-mean" first averages neighbouring heads of the
            side that has more.
        layer_map: for this term alone; the objective's unless given.
    """

    loss: str | Callable = "kl"
    weight: float = 1.0
    heads: str = "one-to-one"
    layer_map: LayerMap | None = None

    def __post_init__(self):
        self.function = _choose("Attention", self.loss, attention_losses.LOSSES)
        if self.heads not in ("one-to-one", "group-mean"):
            raise ValueError(f"Attention(heads={self.heads!r}) is not known; choose 'one-to-one' or 'group-mean'.")


@dataclass
class Outputs:
    """Output-distribution matching.

    Args:
        loss: "forward_kl", "reverse_kl", "jsd", "logit_mse", or any function (student logits, teacher logits, mask, temperature).
        temperature: τ > 0, may be set at any time.
        weight: γ.
        vocab_size: cut both vocabularies to their first `vocab_size` entries, for families that pad the head differently.
    """

    loss: str | Callable = "forward_kl"
    temperature: float = 2.0
    weight: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self):
        self.function = _choose("Outputs", self.loss, output_losses.LOSSES)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"Outputs(temperature={self.temperature!r}): a temperature is finite and above 0.")


@dataclass
class Task:
    """The task's own loss on the labels: cross-entropy (labels of -100 are left out), or mean squared error for one regression output.

    Args:
        weight: δ.
    """

    weight: float = 1.0


class Weights(MutableMapping):
    """Term weights by name. Terms that the objective does not have, and weights that are negative or not finite, are refused."""

    def __init__(self, weights: dict[str, float]):
        self._weights: dict[str, float] = dict.fromkeys(weights, 0.0)
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

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"terms stay; objective.weights[{name!r}] = 0 switches it off at no cost.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return repr(self._weights)


@dataclass
class Breakdown:
    """One evaluation of the objective. A term of weight 0 was not computed and is in none of the dictionaries.

    Attributes:
        total: scalar with graph, the weighted sum.
        terms: {name: scalar with graph}, before weighting.
        weighted: {name: scalar with graph}, whose sum is `total`.
        per_layer: {name: {(student layer, teacher layer): detached scalar}} for the terms that go over layers.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    per_layer: dict[str, dict[Pair, Tensor]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError naming the term and the layer where a loss is NaN or infinite. Waits for the device."""
        if torch.isfinite(self.total):
            return
        for name, value in self.terms.items():
            layers = [f"S{s}←T{t}" for (s, t), v in self.per_layer.get(name, {}).items() if not torch.isfinite(v)]
            if layers or not torch.isfinite(value):
                where = f" at {', '.join(layers)}" if layers else ""
                raise ValueError(
                    f"the {name} term is {value.item()}{where}. If the student's weights are finite, look at the learning rate, at "
                    "half-precision overflow (use bf16), or at a batch without any valid position."
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


@dataclass(frozen=True)
class Needs:
    """What `capture` must keep of one side: layers of hidden states, layers of attention, logits or not."""

    hidden_states: frozenset[int]
    attentions: frozenset[int]
    logits: bool


class Objective(nn.Module):
    """The multi-task distillation loss over two traces. Its parameters are the projections, where widths differ.

    Args:
        layer_map: pairs (student layer, teacher layer) for the feature and attention terms.
        features, attention, outputs, task: the terms; None leaves a term out.

    Raises:
        ValueError: no term at all; later, in a call: heads that differ under one-to-one, widths that differ without projection,
            logits of different sizes, a NaN (named by term and layer).

    >>> objective = Objective(LayerMap.uniform(3, 6), features=Features("mse"), outputs=Outputs("forward_kl", temperature=2.0))
    >>> objective.weights["features"] = 0.3
    """

    def __init__(
        self,
        layer_map: LayerMap | None = None,
        features: Features | None = None,
        attention: Attention | None = None,
        outputs: Outputs | None = None,
        task: Task | None = None,
    ):
        super().__init__()
        self.layer_map = LayerMap.none() if layer_map is None else layer_map
        self.features, self.attention, self.outputs, self.task = features, attention, outputs, task
        terms = {"features": features, "attention": attention, "outputs": outputs, "task": task}
        if not any(terms.values()):
            raise ValueError(
                "an objective needs at least one of features, attention, outputs and task; all four are None."
            )
        self.weights = Weights({name: term.weight for name, term in terms.items() if term is not None})
        self.projections = nn.ModuleDict()  # "S1_T2": Linear(d_S, d_T)

    # -- what it needs --------------------------------------------------------------------------------------------

    def active(self, name: str) -> bool:
        """True when the term exists and its weight is above 0."""
        return self.weights.get(name, 0.0) > 0

    def pairs(self, name: str) -> dict[Pair, float]:
        """The layer pairs of a term and their shares, which sum to 1."""
        term = getattr(self, name)
        layer_map = self.layer_map if term.layer_map is None else term.layer_map
        pairs = dict(zip(layer_map.pairs, layer_map.pair_weights, strict=True))
        if name == "attention":  # embeddings do not attend
            pairs = {pair: w for pair, w in pairs.items() if min(pair) > 0}
        total = sum(pairs.values())
        return {pair: w / total for pair, w in pairs.items() if w > 0}

    def needs(self, side: str, labels: bool = True) -> Needs:
        """What `capture` must keep of "student" or "teacher", at the weights of this moment."""
        index = {"student": 0, "teacher": 1}[side]
        layers = {
            name: frozenset(pair[index] for pair in self.pairs(name)) if self.active(name) else frozenset()
            for name in ("features", "attention")
        }
        logits = self.active("outputs") or (side == "student" and labels and self.active("task"))
        return Needs(layers["features"], layers["attention"], logits)

    def needs_teacher(self) -> bool:
        """False when every term that looks at the teacher is off, so that its forward pass can be saved."""
        needs = self.needs("teacher")
        return bool(needs.hidden_states or needs.attentions or needs.logits)

    def check_layers(self, student_layers: int, teacher_layers: int) -> None:
        """Raise ValueError when a map names a layer that one of the models does not have."""
        self.layer_map.check(student_layers, teacher_layers)
        for term in (self.features, self.attention):
            if term is not None and term.layer_map is not None:
                term.layer_map.check(student_layers, teacher_layers)

    def set_epoch(self, epoch: int) -> None:
        """Draw random layer maps anew; other maps stay."""
        self.layer_map = self.layer_map.for_epoch(epoch)
        for term in (self.features, self.attention):
            if term is not None and term.layer_map is not None:
                term.layer_map = term.layer_map.for_epoch(epoch)

    # -- projections ----------------------------------------------------------------------------------------------

    def prepare(self, student_width: int, teacher_width: int) -> "Objective":
        """Make the projections that differing widths need, before the optimiser is built. Returns itself.

        One linear map d_S → d_T for each mapped pair (the hidden width is the same in every layer of the families here). Random maps get
        one for every pair they may draw.
        """
        if self.features is None or student_width == teacher_width:
            return self
        for pair in self._possible_pairs():
            self._projection(pair, student_width, teacher_width)
        return self

    def _possible_pairs(self) -> list[Pair]:
        layer_map = self.layer_map if self.features.layer_map is None else self.features.layer_map
        if layer_map._redraw is None:
            return layer_map.pairs
        S, T, _ = layer_map._redraw
        return [(s, t) for s in range(1, S + 1) for t in range(s, T - S + s + 1)]

    def _projection(self, pair: Pair, d_student: int, d_teacher: int, like: Tensor | None = None) -> nn.Linear:
        name = f"S{pair[0]}_T{pair[1]}"
        if name not in self.projections:
            if self.features.projection is None:
                raise ValueError(
                    f"student layer {pair[0]} is {d_student} wide, teacher layer {pair[1]} is {d_teacher} wide, and no projection is "
                    "allowed (projection=None); use Features(..., projection='linear') or a student of the teacher's width."
                )
            if like is not None and torch.is_grad_enabled():
                warnings.warn(
                    f"a projection {d_student} → {d_teacher} for S{pair[0]}←T{pair[1]} was made during this call; an optimiser built "
                    "earlier does not train it. Call objective.prepare(d_student, d_teacher) first, and give the optimiser "
                    "objective.parameters() too.",
                    stacklevel=4,
                )
            projection = nn.Linear(d_student, d_teacher, bias=False)
            self.projections[name] = projection if like is None else projection.to(like.device)
        projection = self.projections[name]
        if (projection.in_features, projection.out_features) != (d_student, d_teacher):
            raise ValueError(
                f"the projection of S{pair[0]}←T{pair[1]} maps {projection.in_features} → {projection.out_features}, and the student is "
                f"{d_student} wide, the teacher {d_teacher}: this objective was prepared for other models; make a new one."
            )
        return projection

    # -- the loss -------------------------------------------------------------------------------------------------

    def forward(self, student, teacher=None, labels: Tensor | None = None) -> Breakdown:
        """Compare two traces.

        Args:
            student: `Trace` with graph.
            teacher: `Trace`; it is detached here. None is allowed while no active term looks at a teacher.
            labels: (B,) classes or values, or (B, T) token labels; -100 takes no part. None leaves the task term out.

        Returns:
            Breakdown, whose `.total` one calls `.backward()` on.
        """
        if teacher is None and self.needs_teacher():
            raise ValueError(
                f"the objective {dict(self.weights)} compares with a teacher, and no teacher trace was given."
            )
        teacher = None if teacher is None else teacher.detach()
        terms: dict[str, Tensor] = {}
        per_layer: dict[str, dict[Pair, Tensor]] = {}
        for name, compare in (("features", self._compare_features), ("attention", self._compare_attention)):
            pairs = self.pairs(name) if self.active(name) else {}
            if pairs:
                losses = {pair: compare(student, teacher, pair) for pair in pairs}
                terms[name] = sum(share * losses[pair] for pair, share in pairs.items())
                per_layer[name] = {pair: loss.detach() for pair, loss in losses.items()}
        if self.active("outputs"):
            terms["outputs"] = self._compare_outputs(student, teacher, labels)
        if self.active("task") and labels is not None:
            terms["task"] = task_loss(student.logits, labels, student.causal)
        if not terms:
            raise ValueError(
                f"nothing to compute: weights {dict(self.weights)}, {len(self.layer_map)} layer pairs, "
                f"labels {'given' if labels is not None else 'missing'}. Raise a weight, map a layer, or pass labels."
            )
        weighted = {name: self.weights[name] * value for name, value in terms.items()}
        breakdown = Breakdown(sum(weighted.values()), terms, weighted, per_layer)
        # looking at a number on an accelerator would stop its stream in every step; there the trainer looks when it logs
        if breakdown.total.device.type == "cpu" and not torch.compiler.is_compiling():
            breakdown.check()
        return breakdown

    def _compare_features(self, student, teacher, pair: Pair) -> Tensor:
        ours = _layer(student, student.hidden_states, pair[0], "hidden_states")  # (B, T, d_S)
        theirs = _layer(teacher, teacher.hidden_states, pair[1], "hidden_states")  # (B, T, d_T)
        if ours.shape[-1] != theirs.shape[-1]:
            projection = self._projection(pair, ours.shape[-1], theirs.shape[-1], like=ours)
            ours = projection(ours.to(projection.weight.dtype))  # (B, T, d_T)
        return self.features.function(ours, theirs, _common_mask(student, teacher))

    def _compare_attention(self, student, teacher, pair: Pair) -> Tensor:
        ours, theirs = student.attention_maps(pair[0]), teacher.attention_maps(pair[1])  # (B, H, T, T)
        h_student, h_teacher = ours.shape[1], theirs.shape[1]
        if h_student != h_teacher:
            if self.attention.heads == "one-to-one":
                raise ValueError(
                    f"one-to-one attention alignment at S{pair[0]}←T{pair[1]}: the student has {h_student} heads, the teacher "
                    f"{h_teacher}. Use Attention(..., heads='group-mean'), or a student with {h_teacher} heads."
                )
            fewer = min(h_student, h_teacher)
            ours, theirs = attention_losses.group_mean(ours, fewer), attention_losses.group_mean(theirs, fewer)
        return self.attention.function(ours, theirs, _common_mask(student, teacher))

    def _compare_outputs(self, student, teacher, labels: Tensor | None) -> Tensor:
        ours, theirs = student.logits, teacher.logits  # (B, C) or (B, T, V)
        for side, logits in (("student", ours), ("teacher", theirs)):
            if logits is None:
                raise ValueError(
                    f"output matching needs logits, and the {side}'s trace has none; capture(..., logits=True)."
                )
        if self.outputs.vocab_size is not None:
            ours, theirs = ours[..., : self.outputs.vocab_size], theirs[..., : self.outputs.vocab_size]
        if ours.shape[-1] != theirs.shape[-1]:
            raise ValueError(
                f"vocabulary sizes differ: the student's logits have {ours.shape[-1]} entries, the teacher's {theirs.shape[-1]}. "
                f"If one head is only padded, Outputs(vocab_size={min(ours.shape[-1], theirs.shape[-1])}) cuts both to the shared true "
                "vocabulary; if the tokenisers differ, outputs cannot be matched token by token."
            )
        if ours.shape[-1] == 1 and self.outputs.function is not output_losses.logit_mse:
            raise ValueError(
                f"{self.outputs.loss} over a single output is 0 whatever the models say (softmax of one number is 1); "
                "for regression use Outputs('logit_mse')."
            )
        mask = None
        if ours.dim() == 3:
            ours, theirs, mask = _predicting_positions(
                ours, theirs, _common_mask(student, teacher), labels, student.causal
            )
        return self.outputs.function(ours, theirs, mask, temperature=self.outputs.temperature)


def task_loss(logits: Tensor, labels: Tensor, causal: bool = False) -> Tensor:
    """The task's own loss, a mean over the labels that count; 0 (with graph) when all of them are -100.

    Args:
        logits: (B, C) or (B, T, V); C = 1 means regression.
        labels: (B,) or (B, T); -100, or NaN in regression, takes no part.
        causal: logits at t predict the label at t + 1.
    """
    if logits is None:
        raise ValueError("the task loss needs the student's logits, and its trace has none; capture(..., logits=True).")
    labels = labels.to(logits.device)
    logits = at_least_float32(logits)
    if logits.dim() == 3 and causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; one label a prediction."
        )
    if logits.shape[-1] == 1:
        valid = (labels != -100) & ~labels.isnan()
        error = (logits.squeeze(-1) - labels.masked_fill(~valid, 0)).square()
        return (error * valid).sum() / valid.sum().clamp_min(1)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp_min(1)


def _predicting_positions(ours: Tensor, theirs: Tensor, mask: Tensor | None, labels: Tensor | None, causal: bool):
    """Cut (B, T, V) logits to the positions that predict something: a valid next token in causal models, any token otherwise."""
    mask = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if mask is None else mask
    if not causal:
        return ours, theirs, mask
    mask = mask[:, :-1] & mask[:, 1:]
    if labels is not None:
        labelled = labels[:, 1:].to(mask.device) != -100
        # rows without any label are unlabelled text, whose every token counts; others count where they carry one
        mask = mask & (labelled | ~labelled.any(dim=1, keepdim=True))
    return ours[:, :-1], theirs[:, :-1], mask


def _common_mask(student, teacher) -> Tensor | None:
    if student.mask is None or teacher.mask is None:
        return student.mask if teacher.mask is None else teacher.mask
    if student.mask.shape != teacher.mask.shape:
        raise ValueError(
            f"the student saw {tuple(student.mask.shape)} tokens, the teacher {tuple(teacher.mask.shape)} (B, T): both must be given the "
            "same batch, made by the same tokeniser."
        )
    return student.mask & teacher.mask.to(student.mask.device)


def _layer(trace, kept: dict[int, Tensor], layer: int, what: str) -> Tensor:
    if layer not in kept:
        raise ValueError(
            f"{what} of layer {layer} asked of a trace of {trace.name} that holds layers {sorted(kept)}; "
            f"capture(..., {what}=[{layer}]) keeps it."
        )
    return kept[layer]


def _choose(term: str, loss: str | Callable, known: dict[str, Callable]) -> Callable:
    if callable(loss):
        return loss
    if loss not in known:
        raise ValueError(f"{term}({loss!r}) is not known; choose one of {list(known)} or pass a function.")
    return known[loss]
