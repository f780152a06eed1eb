"""The multi-task loss of arXiv 2412.19449: feature matching, attention alignment and output matching, beside the task loss.

    L = α L_features + β L_attention + γ L_outputs + δ L_task

Each term is optional, each weight may change at any time, and each call returns a breakdown by term and by layer pair.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fakit.layer_maps import Depths, LayerMap
from fakit.losses import attention as attention_losses
from fakit.losses import outputs as output_losses
from fakit.losses.fused import streamed
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.task import REGRESSION, SEVERAL_LABELS, task_loss
from fakit.objective.breakdown import Breakdown, Pair, Weights
from fakit.objective.terms import Attention, Features, Outputs, Task


@dataclass(frozen=True)
class Needs:
    """What `capture` must keep of one side: layers of hidden states, layers of attention, logits or not, and whether a head may stand for them."""

    hidden_states: frozenset[int]
    attentions: frozenset[int]
    logits: bool
    in_chunks: bool = field(default=False, compare=False)  # capture(..., logits="head") will do

    @property
    def capture_logits(self) -> bool | str:
        """What to ask of `capture` as `logits`: "head" where that will do."""
        return "head" if self.in_chunks else self.logits


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
        for name, term in (("features", features), ("attention", attention)):
            if term is not None and layer_map is None and term.layer_map is None:
                raise ValueError(
                    f"{name} was given and no layer map, so that the term would compare nothing: Objective(LayerMap.uniform(S, T), {name}=…) for a "
                    "student of S and a teacher of T layers, or LayerMap.none() where that is meant."
                )
        self.weights = Weights({name: term.weight for name, term in terms.items() if term is not None})
        self.projections = nn.ModuleDict()  # "S1_T2": Linear(d_S, d_T)
        self._matches: dict[Pair, Tensor] = {}  # of the call at hand

    @property
    def temperature(self) -> float | None:
        """τ of the outputs term, which may be set at any time; None without that term."""
        return None if self.outputs is None else self.outputs.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if self.outputs is None:
            raise ValueError(
                "this objective has no outputs term, and so no temperature; Objective(…, outputs=Outputs())."
            )
        self.outputs.temperature = temperature

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("features", "attention", "outputs", "task") and name in self.__dict__:
            raise ValueError(
                f"objective.{name} cannot be set once the objective is made: weights, projections and a cache follow from its terms. Make a new "
                f"Objective(…, {name}=…); objective.weights[{name!r}] = 0 switches the term off."
            )
        super().__setattr__(name, value)

    # -- what it needs --------------------------------------------------------------------------------------------

    def active(self, name: str) -> bool:
        """True when the term exists and its weight is above 0."""
        return self.weights.get(name, 0.0) > 0

    def map_of(self, name: str) -> LayerMap:
        """The layer map of "features" or "attention": its own, or the objective's."""
        own = getattr(self, name).layer_map
        return self.layer_map if own is None else own

    def pairs(self, name: str) -> dict[Pair, float]:
        """The layer pairs of a term and their shares, which sum to 1."""
        layer_map = self.map_of(name)
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
        in_chunks = logits and (
            not self.active("outputs") or (self.outputs.chunked and not callable(self.outputs.loss))
        )
        return Needs(layers["features"], layers["attention"], logits, in_chunks)

    def needs_teacher(self) -> bool:
        """False when every term that looks at the teacher is off, so that its forward pass can be saved."""
        needs = self.needs("teacher")
        return bool(needs.hidden_states or needs.attentions or needs.logits)

    def check_layers(self, student_layers: Depths, teacher_layers: Depths) -> None:
        """Raise ValueError when a map names a layer that one of the models does not have, or pairs an encoder's layer with a decoder's.

        Args:
            student_layers, teacher_layers: depths; of encoder-decoders those of encoder and decoder (`fakit.models.stack_depths`).
        """
        self.layer_map.check(student_layers, teacher_layers)
        for term in (self.features, self.attention):
            if term is not None and term.layer_map is not None:
                term.layer_map.check(student_layers, teacher_layers)

    def set_epoch(self, epoch: int) -> None:
        """Draw random layer maps anew; other maps stay."""
        self.layer_map = self.layer_map.for_epoch(epoch)
        for name in ("features", "attention"):
            term = getattr(self, name)
            if (
                term is not None and term.layer_map is not None
            ):  # a term like it: the one that was given stays as it was made
                self.__dict__[name] = replace(term, layer_map=term.layer_map.for_epoch(epoch))

    # -- projections ----------------------------------------------------------------------------------------------

    def prepare(self, student_width: int, teacher_width: int) -> "Objective":
        """Make the projections that differing widths need, before the optimiser is built. Returns itself.

        One linear map d_S → d_T for each mapped pair (the hidden width is the same in every layer of the families here). Random maps get
        one for every pair they may draw.
        """
        if self.features is None or student_width == teacher_width:
            return self
        for pair in self.map_of("features").possible_pairs():
            self._projection(pair, student_width, teacher_width)
        return self

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

    def forward(
        self, student, teacher=None, labels: Tensor | None = None, shares: Mapping[str, Tensor] | None = None
    ) -> Breakdown:
        """Compare two traces.

        Args:
            student: `Trace` with graph.
            teacher: `Trace`; it is detached here. None is allowed while no active term looks at a teacher.
            labels: (B,) classes or values, or (B, T) token labels; -100 takes no part. None leaves the task term out.
            shares: a factor () for every term: what this batch, a part of an optimiser step, counts for in it (`fakit.training.token_counts`).

        Returns:
            Breakdown, whose `.total` one calls `.backward()` on.
        """
        if teacher is None and self.needs_teacher():
            raise ValueError(
                f"the objective {dict(self.weights)} compares with a teacher, and no teacher trace was given."
            )
        teacher = None if teacher is None else teacher.detach()
        labels = student.own_labels(labels)
        self._matches = {}
        terms: dict[str, Tensor] = {}
        per_layer: dict[str, dict[Pair, Tensor]] = {}
        for name, compare in (("features", self._compare_features), ("attention", self._compare_attention)):
            pairs = self.pairs(name) if self.active(name) else {}
            if pairs:
                losses = {pair: compare(student, teacher, pair) for pair in pairs}
                terms[name] = sum(share * losses[pair] for pair, share in pairs.items())
                per_layer[name] = {pair: loss.detach() for pair, loss in losses.items()}
        together = None
        predicts = self.active("outputs") or (self.active("task") and labels is not None)
        if predicts and student.head is not None and not (self.active("outputs") and teacher.head is None):
            together, chunked = self._compare_heads(student, teacher, labels, shares)
            terms |= chunked
        elif predicts:
            student = _with_logits(student)
            if self.active("outputs"):
                terms["outputs"] = self._compare_outputs(student, _with_logits(teacher), labels)
            if self.active("task") and labels is not None:
                terms["task"] = task_loss(student.logits, labels, student.causal, student.problem_type)
        if not terms:
            raise ValueError(
                f"nothing to compute: weights {dict(self.weights)}, {len(self.layer_map)} layer pairs, "
                f"labels {'given' if labels is not None else 'missing'}. Raise a weight, map a layer, or pass labels."
            )
        if shares is not None:
            terms = {name: shares[name] * value for name, value in terms.items()}
            per_layer = {n: {pair: shares[n] * v for pair, v in pairs.items()} for n, pairs in per_layer.items()}
        weighted = {name: self.weights[name] * value for name, value in terms.items()}
        total = sum(weighted.values())
        if together is not None:  # the same number; its gradient is there already
            total = together + sum(value for name, value in weighted.items() if name not in ("outputs", "task"))
        breakdown = Breakdown(total, terms, weighted, per_layer, self._matches)
        # looking at a number on an accelerator would stop its stream in every step; there the trainer looks when it logs
        if breakdown.total.device.type == "cpu" and not torch.compiler.is_compiling():
            breakdown.check(lambda name, pairs: whose_numbers(name, pairs, student, teacher))
        return breakdown

    def _compare_features(self, student, teacher, pair: Pair) -> Tensor:
        ours = _layer(student, student.hidden_states, pair[0], "hidden_states")  # (B, T, d_S)
        theirs = _layer(teacher, teacher.hidden_states, pair[1], "hidden_states")  # (B, T, d_T)
        if ours.shape[-1] != theirs.shape[-1]:
            projection = self._projection(pair, ours.shape[-1], theirs.shape[-1], like=ours)
            ours = projection(ours.to(projection.weight.dtype))  # (B, T, d_T)
        return self.features.function(ours, theirs, _common_mask(student, teacher, pair))

    def _compare_attention(self, student, teacher, pair: Pair) -> Tensor:
        sides = [trace.attention.get(layer) for trace, layer in zip((student, teacher), pair, strict=True)]
        mask = _common_mask(student, teacher, pair)
        if self.attention.loss == "relations":
            return self._compare_relations(student, teacher, pair, mask)
        if (
            callable(self.attention.loss) or None in sides
        ):  # maps in full: a function wants them, or a family gives nothing else
            return self._compare_maps(student, teacher, pair, mask)
        heads = self._heads(pair, *(side.query.shape[1] for side in sides))
        if self.attention.heads == "best-match":
            costs = streamed.head_costs(self.attention.loss, *sides, mask)
            self._matches[pair] = streamed.match_heads(costs)
            sides[1] = sides[1].select_heads(self._matches[pair])
        return streamed.streamed_loss(self.attention.loss, *sides, mask, heads)

    def _compare_maps(self, student, teacher, pair: Pair, mask: Tensor | None) -> Tensor:
        ours, theirs = student.attention_maps(pair[0]), teacher.attention_maps(pair[1])  # (B, H, T, T)
        heads = self._heads(pair, ours.shape[1], theirs.shape[1])
        if self.attention.heads == "best-match":
            measure = attention_losses.map_kl if callable(self.attention.loss) else self.attention.function
            costs = attention_losses.head_costs(measure, ours.detach(), theirs, mask)
            self._matches[pair] = streamed.match_heads(costs)
            theirs = theirs[:, self._matches[pair]]
        elif heads is not None:
            ours, theirs = attention_losses.group_mean(ours, heads), attention_losses.group_mean(theirs, heads)
        if (
            student.causal and teacher.causal and not callable(self.attention.loss)
        ):  # the future takes no part in a mean
            past = torch.ones(ours.shape[-2:], dtype=torch.bool, device=ours.device).tril()
            tokens = torch.ones(ours.shape[0::2], dtype=torch.bool, device=ours.device) if mask is None else mask
            mask = past & tokens[:, None, :, None] & tokens[:, None, None, :]  # (B, 1, T, T)
            if student.documents is not None:
                mask = mask & (student.documents[:, None, :, None] == student.documents[:, None, None, :])
        return self.attention.function(ours, theirs, mask)

    def _compare_relations(self, student, teacher, pair: Pair, mask: Tensor | None) -> Tensor:
        for trace, layer in zip((student, teacher), pair, strict=True):
            if layer in trace.maps:
                raise ValueError(
                    f"relations are of queries, keys and values, and {trace.name} gives only its attention maps; use Attention('kl') or "
                    "Attention('mse'), or a model that uses transformers' attention interface."
                )
        ours, theirs = (_layer(t, t.attention, i, "attentions") for t, i in zip((student, teacher), pair, strict=True))
        which, heads = self.attention.relations, self.attention.relation_heads
        heads = streamed.relation_heads(ours, theirs, which) if heads is None else heads
        losses = [
            streamed.streamed_loss("kl", *(streamed.relation_inputs(side, x, heads) for side in (ours, theirs)), mask)
            for x in which
        ]
        return sum(losses) / len(losses)

    def _heads(self, pair: Pair, student: int, teacher: int) -> int | None:
        """The number of heads that maps are averaged down to; None where heads are compared as they are."""
        if student == teacher or self.attention.heads == "best-match":
            return None
        if self.attention.heads == "one-to-one":
            raise ValueError(
                f"one-to-one attention alignment at S{pair[0]}←T{pair[1]}: the student has {student} heads, the teacher "
                f"{teacher}. Use Attention(..., heads='group-mean' or 'best-match'), Attention('relations'), or a student with {teacher} heads."
            )
        return min(student, teacher)

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
        mask, named = None, not callable(self.outputs.loss)
        problem = _problem_type(student, teacher, ours, labels)
        if named and self.outputs.function is not output_losses.logit_mse:
            if problem == SEVERAL_LABELS:
                ours, theirs = output_losses.bernoulli(ours), output_losses.bernoulli(theirs)  # (B, C, 2)
                return self.outputs.function(ours, theirs, None, temperature=self.outputs.temperature)
            check_distribution(self.outputs.loss, problem, ours.shape[-1])
        if ours.dim() == 3:
            mask = _predicting_positions(student, teacher, labels, ours)
            if student.causal:
                ours, theirs = ours[:, :-1], theirs[:, :-1]
        return self.outputs.function(ours, theirs, mask, temperature=self.outputs.temperature)

    def _compare_heads(self, student, teacher, labels: Tensor | None, shares) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs and task, or one of them, a chunk of logits at a time: their weighted sum, and each of them."""
        settings = self.outputs or Outputs()  # of a term that is not there nothing is used
        ours, labels = student.head, labels if self.active("task") else None
        mask, theirs = None, ours.detach()  # not looked at by the task alone
        if self.active("outputs"):
            mask, theirs = _predicting_positions(student, teacher, labels, ours.hidden), teacher.head
        if student.causal:
            ours, theirs = (replace(head, hidden=head.hidden[:, :-1]) for head in (ours, theirs))  # (B, T - 1, d)
            labels = None if labels is None else labels[:, 1:]
        total, outputs, task = fused_outputs(
            ours,
            theirs,
            mask,
            divergence=settings.loss,
            temperature=settings.temperature,
            weights=(self.weights.get("outputs", 0.0), self.weights.get("task", 0.0)),
            labels=labels,
            vocab_size=settings.vocab_size,
            shares=tuple((shares or {}).get(name) for name in ("outputs", "task")),
        )
        return total, {n: v for n, v in (("outputs", outputs), ("task", task)) if v is not None}


def _predicting_positions(student, teacher, labels: Tensor | None, like: Tensor) -> Tensor:
    """Which positions of (B, T, …) predict something: a valid next token in causal models (B, T - 1), any token otherwise (B, T)."""
    mask = _both(student.logits_mask, teacher.logits_mask)
    mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask
    return predicting_positions(mask, labels, student.causal, student.documents)


def predicting_positions(mask: Tensor, labels: Tensor | None, causal: bool, documents: Tensor | None = None) -> Tensor:
    """Which tokens of a mask (B, T) predict something: all of them, or in causal models those before a valid one, (B, T - 1).

    `documents` (B, T) numbers those of packed rows: the last token of one does not predict the first of the next.
    """
    if not causal:
        return mask
    mask = mask[:, :-1] & mask[:, 1:]
    if documents is not None:
        mask = mask & (documents[:, :-1] == documents[:, 1:])
    if labels is not None:
        labelled = labels[:, 1:].to(mask.device) != -100
        # texts without any label are unlabelled, and every token of theirs counts; others count where they carry one
        if documents is None:
            found = labelled.any(dim=1, keepdim=True)
        else:
            own = (labelled & mask).long()
            found = torch.zeros_like(documents).scatter_add_(1, documents[:, 1:], own).gather(1, documents[:, 1:]) > 0
        mask = mask & (labelled | ~found)
    return mask


def _problem_type(student, teacher, logits: Tensor, labels: Tensor | None) -> str | None:
    """What logits mean: as the models' configurations say; where they do not, as their labels do (the rule of transformers)."""
    if logits.dim() != 2:
        return None
    stated = {trace.problem_type for trace in (student, teacher)} - {None}
    if len(stated) == 2:
        raise ValueError(
            f"the student's problem_type is {student.problem_type}, the teacher's {teacher.problem_type}: their logits mean different things "
            "and cannot be compared. Give both configurations one problem_type, or leave the output term out (outputs=None)."
        )
    if stated:
        return stated.pop()
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape and labels.shape[1] > 1
    return SEVERAL_LABELS if several else None


def check_distribution(loss: str, problem: str | None, classes: int) -> None:
    """Raise ValueError where a divergence of distributions is asked of numbers that are none."""
    if problem == SEVERAL_LABELS:
        return
    if classes == 1:
        raise ValueError(
            f"{loss} over a single output is 0 whatever the models say (softmax of one number is 1); "
            "for regression use Outputs('logit_mse')."
        )
    if problem == REGRESSION:
        raise ValueError(
            f"{loss} compares distributions, and {classes} outputs of a regression (problem_type) are none; use Outputs('logit_mse')."
        )


def whose_numbers(name: str, pairs: list[Pair], student, teacher) -> str:
    """Which side's numbers a term that is NaN or infinite comes from; "" where both are finite, or not known (None)."""
    for index, (side, trace) in ((1, ("teacher", teacher)), (0, ("student", student))):
        if trace is None or (side == "teacher" and name == "task"):
            continue
        for layer in [pair[index] for pair in pairs] or [None]:
            found = _not_finite(trace, name, layer)
            if found:
                fix = (
                    " Look at its weights: damaged, or loaded in float16 where bfloat16 or float32 would hold them."
                    * index
                )
                return f"the {side}'s ({trace.name}) {found} not finite.{fix}"
    return ""


def _not_finite(trace, name: str, layer: int | None) -> str | None:
    if name == "features":
        given, mask, what = (
            [trace.hidden_states.get(layer)],
            trace.layer_mask(layer),
            f"hidden states of layer {layer} are",
        )
    elif name == "attention":
        inputs, mask, what = trace.attention.get(layer), None, f"attention inputs of layer {layer} are"
        given = [trace.maps.get(layer)] if inputs is None else [inputs.query, inputs.key, inputs.value]
    else:
        head, mask, what = trace.head, None, "logits are"
        given = [trace.logits] if head is None else [head.hidden, head.weight, head.bias]
        if all(x is None or x.dim() == 3 for x in given[:1]):
            mask = trace.logits_mask
    for number, x in enumerate(x for x in given if x is not None):
        # a logit of -inf takes its class out of the vocabulary
        wrong = (x.isnan() | (x == float("inf"))) if what == "logits are" else ~x.isfinite()
        if mask is not None and number == 0 and wrong.shape[:2] == mask.shape:
            wrong = wrong & mask.unsqueeze(-1)
        if wrong.any():
            return what
    return None


def _with_logits(trace):
    """A trace whose logits are wanted whole after all, because the other side has no head to go by."""
    if trace is None or trace.head is None or trace.logits is not None:
        return trace
    return replace(trace, logits=trace.head.logits())


def _common_mask(student, teacher, pair: Pair) -> Tensor | None:
    """The tokens that count on both sides. bool (B, T)"""
    ends = (student.encoder_layers, teacher.encoder_layers)
    if None not in ends and (pair[0] > ends[0]) != (pair[1] > ends[1]):
        raise ValueError(
            f"pair S{pair[0]}←T{pair[1]} matches an encoder's layer with a decoder's, which work on different tokens: the student's encoder ends "
            f"with layer {ends[0]}, the teacher's with {ends[1]}. Map each stack by itself: LayerMap.uniform([encoder, decoder], [encoder, decoder])."
        )
    return _both(student.layer_mask(pair[0]), teacher.layer_mask(pair[1]))


def _both(student: Tensor | None, teacher: Tensor | None) -> Tensor | None:
    if student is None or teacher is None:
        return student if teacher is None else teacher
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student saw {tuple(student.shape)} tokens, the teacher {tuple(teacher.shape)} (B, T): both must be given the "
            "same batch, made by the same tokeniser, and a layer map pairs encoder with encoder and decoder with decoder."
        )
    return student & teacher.to(student.device)


def _layer(trace, kept: dict[int, Tensor], layer: int, what: str) -> Tensor:
    if layer not in kept:
        raise ValueError(
            f"{what} of layer {layer} asked of a trace of {trace.name} that holds layers {sorted(kept)}; "
            f"capture(..., {what}=[{layer}]) keeps it."
        )
    return kept[layer]
