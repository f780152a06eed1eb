"""The multi-task loss of arXiv 2412.19449: feature matching, attention alignment and output matching,
beside the task loss.

    L = α L_features + β L_attention + γ L_outputs + δ L_task

It is a dictionary of terms and their weighted sum: each term is optional, others may be added, each weight may change
at any time, and each call returns a breakdown by term and by layer pair.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fakit.layer_maps import Depths, LayerMap, Pair
from fakit.objective.attention import Attention
from fakit.objective.balancing import Balancing, make_balancing
from fakit.objective.breakdown import Breakdown, total
from fakit.objective.comparison import compare
from fakit.objective.diagnosis import whose_numbers
from fakit.objective.features import Features
from fakit.objective.fitting import fit_projections, fit_standardization
from fakit.objective.needs import Needs
from fakit.objective.outputs import Outputs
from fakit.objective.over_layers import OverLayers
from fakit.objective.schedules import Schedule, all_off
from fakit.objective.standardization import Standardization
from fakit.objective.task import Task
from fakit.objective.temperature import LearnedTemperature, Softened
from fakit.objective.term import Term
from fakit.objective.weights import Weights
from fakit.tracing.trace import Trace

Kind = TypeVar("Kind", bound=Term)
OWN = ("features", "attention", "outputs", "task")


class Objective(nn.Module):
    """The multi-task distillation loss over two traces. Its parameters are the projections, where widths differ, what
    balancing learns, and learned temperatures.

    Args:
        layer_map: pairs (student layer, teacher layer) for the terms that go over layers and have no map of their own.
        features, attention, outputs, task: the paper's four terms; None leaves a term out.
        terms: further ones by name, also several of one kind.
        balancing: factors on the weights, found while training: "uncertainty", "gradient_norm", or one of
            `fakit.objective.balancing` with its own settings. None: the weights are as they were set.

    Raises:
        ValueError: no term at all, a name or a term that is none; later, in a call: heads that differ under one-to-one,
            widths that differ without projection, logits of different sizes, a NaN (named by term and layer).

    >>> objective = Objective(
    ...     LayerMap.uniform(3, 6),
    ...     features=Features("mse"),
    ...     outputs=Outputs("forward_kl", temperature=2.0),
    ...     terms={"embeddings": Features("mse", layer_map=LayerMap([(0, 0)]), weight=0.5)},
    ... )
    >>> objective.weights["features"] = 0.3
    >>> objective.temperature = Schedule(4.0, 1.0, "cosine", end=500)
    >>> objective.set_step(250)
    >>> objective.temperature
    2.5
    """

    def __init__(
        self,
        layer_map: LayerMap | None = None,
        features: Features | None = None,
        attention: Attention | None = None,
        outputs: Outputs | None = None,
        task: Task | None = None,
        terms: Mapping[str, Term] | None = None,
        balancing: str | Balancing | None = None,
    ):
        super().__init__()
        given = dict(zip(OWN, (features, attention, outputs, task), strict=True))
        given = {name: term for name, term in given.items() if term is not None} | _named(terms)
        if not given:
            raise ValueError(
                "an objective needs at least one of features, attention, outputs and task, or terms={name: term}; none "
                "was given."
            )
        for name, term in given.items():
            _check_term(name, term)
            over_layers = isinstance(term, OverLayers)
            if over_layers and layer_map is None and term.layer_map is None:
                keyword = f"{name}=…" if name in OWN else f"terms={{{name!r}: …}}"
                raise ValueError(
                    f"{name} was given and no layer map, so that the term would compare nothing: "
                    f"Objective(LayerMap.uniform(S, T), {keyword}) for a student of S and a teacher of T layers, or "
                    "LayerMap.none() where that is meant."
                )
        self._layer_map = LayerMap.none() if layer_map is None else layer_map
        self.projections = nn.ModuleDict()  # "S1_T2": Linear(d_S, d_T); "phi_s_T2": a standardization
        self._terms = {n: term.placed(n, self._layer_map, self.projections) for n, term in given.items()}
        self.weights = Weights(self._terms)
        self._step = 0
        self.factors: dict[str, Tensor] = {}  # of balancing, on the weights of the last call
        self.balancing = make_balancing(balancing)
        if self.balancing is not None:
            self.balancing.prepare(tuple(self._terms))
        self.stepped = False  # once `set_step` was called: until then, schedules stand where they start

    # -- its terms ------------------------------------------------------------------------------------------------

    @property
    def terms(self) -> Mapping[str, Term]:
        """All terms by name, in order."""
        return MappingProxyType(self._terms)

    @property
    def features(self) -> Features | None:
        """The term of this name, or None; so the next three."""
        return cast("Features | None", self._terms.get("features"))

    @property
    def attention(self) -> Attention | None:
        return cast("Attention | None", self._terms.get("attention"))

    @property
    def outputs(self) -> Outputs | None:
        return cast("Outputs | None", self._terms.get("outputs"))

    @property
    def task(self) -> Task | None:
        return cast("Task | None", self._terms.get("task"))

    def of_kind(self, kind: type[Kind]) -> dict[str, Kind]:
        """The terms of a class, by name."""
        return {name: term for name, term in self._terms.items() if isinstance(term, kind)}

    @property
    def softened(self) -> dict[str, Any]:
        """The terms that have a temperature, by name."""
        return {name: term for name, term in self._terms.items() if hasattr(term, "temperature")}

    @property
    def taus(self) -> dict[str, float | Tensor]:
        """τ of this step, by term that has one: what was set, or where it is learned what it has come to, () without
        graph.
        """
        with torch.no_grad():
            return {n: t.tau if isinstance(t, Softened) else t.temperature for n, t in self.softened.items()}

    @property
    def temperature(self) -> float | None:
        """τ of the terms that have one, which may be set at any time, to a number or a `Schedule`: then of all of them.
        None where none has. Where it is learned (`Outputs(reversal=…)`) it is the lowest that τ may become.
        """
        return next((term.temperature for term in self.softened.values()), None)

    @temperature.setter
    def temperature(self, temperature: float | Schedule) -> None:
        if not self.softened:
            raise ValueError(
                "this objective has no outputs term, and so no temperature; Objective(…, outputs=Outputs())."
            )
        for term in self.softened.values():
            term.temperature = temperature

    @property
    def settings(self) -> dict[str, dict[str, float | Schedule]]:
        """What may be set at any time, as it was written: {term: {"weight": …, "temperature": …}}; may be set, too."""
        return {
            name: {setting: term.written(setting) for setting in ("weight", *sorted(term.settable))}
            for name, term in self._terms.items()
        }

    @settings.setter
    def settings(self, settings: Mapping[str, Mapping[str, float | Schedule]]) -> None:
        for name, own in settings.items():
            for setting, value in own.items():
                if setting == "weight":
                    self.weights[name] = value
                else:
                    setattr(self._terms[name], setting, value)

    @property
    def layer_map(self) -> LayerMap:
        """Of the terms that have none of their own; may be set between two steps."""
        return self._layer_map

    @layer_map.setter
    def layer_map(self, layer_map: LayerMap) -> None:
        self._layer_map = layer_map
        for term in self._terms.values():
            if term.layer_map is None:
                term.place.layer_map = layer_map

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or name == "terms":
            raise ValueError(
                f"objective.{name} cannot be set once the objective is made: weights, projections and a cache follow "
                f"from its terms. Make a new Objective(…, {name}=…); objective.weights[{name!r}] = 0 switches the term "
                "off."
            )
        super().__setattr__(name, value)

    # -- schedules ------------------------------------------------------------------------------------------------

    @property
    def schedules(self) -> dict[str, Schedule]:
        """What changes with the step: {"features.weight": …, "outputs.temperature": …, "outputs.t": …}."""
        found = {}
        for name, term in self._terms.items():
            for setting, written in term.place.schedules.items():
                inside = {setting: written} if isinstance(written, Schedule) else written
                found |= {f"{name}.{key}": value for key, value in inside.items() if isinstance(value, Schedule)}
        return found

    def set_step(self, step: int, of: int | None = None) -> None:
        """Put every schedule at its number of an optimizer step. A loop of one's own calls it before each step, once
        for all micro-batches; `DistillationTrainer` does it itself.

        Args:
            step: optimizer steps done: 0 before the first.
            of: in all; schedules without an end ask for it.

        Raises:
            ValueError: a schedule without an end and no `of`, or one that starts only there.

        >>> objective = Objective(outputs=Outputs(weight=Schedule(0.0, 1.0)))
        >>> for step in range(4):
        ...     objective.set_step(step, of=4)
        ...     print(objective.weights["outputs"], objective.needs_teacher())
        0.0 False
        0.25 True
        0.5 True
        0.75 True
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"set_step({step!r}): a step is the number of optimizer steps done, 0 before the first.")
        for name, schedule in self.schedules.items():
            try:
                schedule.until(of)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for term in self._terms.values():
            term.set_step(step, of)
        self._step, self.stepped = step, True

    def check_schedules(self, steps: int) -> None:
        """Raise ValueError where a training of so many steps would come to one in which every weight is 0."""
        written = {name: term.written("weight") for name, term in self._terms.items()}
        if (step := all_off(written, steps)) is not None:
            weights = ", ".join(f"{name} {weight}" for name, weight in written.items())
            raise ValueError(
                f"when {step} of {steps} steps are done, every weight is 0, and nothing is left to learn from: "
                f"{weights}. Let one of them stay above 0."
            )

    # -- what it needs --------------------------------------------------------------------------------------------

    def active(self, name: str) -> bool:
        """True when the term exists and its weight is above 0 in this step."""
        return self.weights.get(name, 0.0) > 0

    def ever_active(self, name: str) -> bool:
        """True when it is active now, or its schedule may make it so."""
        return self.active(name) or name in self.weights.schedules

    def map_of(self, name: str) -> LayerMap:
        """The layer map of a term: its own, or the objective's."""
        return self._terms[name].place.layer_map

    def pairs(self, name: str) -> dict[Pair, float]:
        """The layer pairs of a term and their shares, which sum to 1."""
        return self._terms[name].shares()

    def needs_of(self, name: str, side: str) -> Needs:
        """What `capture` must keep of "student" or "teacher" for one term, whatever its weight."""
        return Needs.of(self._terms[name].needs(side), f"the {name} term ({type(self._terms[name]).__name__})")

    def needs(self, side: str, labels: bool = True) -> Needs:
        """What `capture` must keep of "student" or "teacher", at the weights of this moment."""
        if side not in ("student", "teacher"):
            raise ValueError(f"side {side!r} is not known: 'student' or 'teacher'.")
        found = Needs()
        for name, term in self._terms.items():
            if self.active(name) and (labels or not term.needs_labels):
                found = found | self.needs_of(name, side)
        return found

    def needs_teacher(self) -> bool:
        """False when every term that looks at the teacher is off, so that its forward pass can be saved."""
        return bool(self.needs("teacher"))

    def check_layers(self, student_layers: Depths, teacher_layers: Depths) -> None:
        """Raise ValueError when a map names a layer that one of the models does not have,
        or pairs an encoder's layer with a decoder's.

        Args:
            student_layers, teacher_layers: depths; of encoder-decoders those of encoder and decoder
                (`fakit.models.stack_depths`).
        """
        self.layer_map.check(student_layers, teacher_layers)
        for name, term in self._terms.items():
            term.check_layers(student_layers, teacher_layers)
            for side, depths in (("student", student_layers), ("teacher", teacher_layers)):
                needs, deepest = self.needs_of(name, side), depths if isinstance(depths, int) else sum(depths)
                beyond = sorted(layer for layer in needs.layers if layer > deepest)
                if beyond:
                    raise ValueError(
                        f"the {name} term needs layer {beyond[0]} of the {side}, which has layers 0–{deepest}: change "
                        f"its needs({side!r})."
                    )

    def set_epoch(self, epoch: int) -> None:
        """Draw random layer maps anew; other maps stay."""
        self._layer_map = self._layer_map.for_epoch(epoch)
        for term in self._terms.values():
            term.place.layer_map = term.place.layer_map.for_epoch(epoch)
            if term.layer_map is not None:  # its own
                vars(term)["layer_map"] = term.place.layer_map

    def prepare(self, student_width: int, teacher_width: int) -> "Objective":
        """Make what terms train beside the student, such as the projections that differing widths need,
        before the optimizer is built.

        The hidden width is the same in every layer of the families here. Returns itself.
        """
        for term in self._terms.values():
            term.prepare(student_width, teacher_width)
        return self

    def fit_standardization(
        self, teachers: Iterable[Trace], gather: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, int]:
        """Gather the statistics by which terms standardize the teacher (`Features(standardize=…)`), once: they stay in
        the objective's state, and its checkpoints.

        Args:
            teachers: traces with what the objective needs of the teacher.
            gather: of several processes, puts their tensors one after another along the first dimension.

        Returns:
            {standardization: number of tokens it is of}

        Raises:
            ValueError: nothing that standardizes, or a layer that no trace holds.
        """
        fit_standardization(list(self.of_kind(Features).values()), self.projections, teachers, gather)
        return self.standardizations

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """While open, the objective may be asked as in training; what it learned from a batch by itself (`EarthMover`'s
        masses) is put back.
        """
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        try:
            yield
        finally:
            for name, buffer in self.named_buffers():
                if name in before:
                    buffer.copy_(before[name])

    @property
    def standardizations(self) -> dict[str, int]:
        """How many tokens each standardization of the teacher is of; 0 until it is gathered."""
        modules = self.projections.items()
        return {name: int(module.tokens) for name, module in modules if isinstance(module, Standardization)}

    @property
    def projection_parameters(self) -> dict[str, int]:
        """How many numbers each projection trains beside the student; none of them is in its export."""
        return {
            name: sum(p.numel() for p in module.parameters())
            for name, module in self.projections.items()
            if list(module.parameters()) and not isinstance(module, LearnedTemperature)
        }

    def fit_projections(self, students: Iterable[Trace], teachers: Iterable[Trace]) -> dict[str, float]:
        """Start linear and orthogonal projections at the best maps between some traces, in place of random ones.

        Args:
            students, teachers: traces of the same batches, in order, with what the objective needs.

        Returns:
            {projection: the share of the teacher's squares that its map leaves, 0…1}

        Raises:
            ValueError: no projections, one that has no closed form ("mlp"), or numbers of traces that differ.
        """
        return fit_projections(list(self.of_kind(Features).values()), students, teachers)

    # -- the loss -------------------------------------------------------------------------------------------------

    def forward(
        self,
        student: Trace,
        teacher: Trace | None = None,
        labels: Tensor | None = None,
        shares: Mapping[str, Tensor] | None = None,
        written: bool = False,
    ) -> Breakdown:
        """Compare two traces.

        Args:
            student: `Trace` with graph.
            teacher: `Trace`; it is detached here. None is allowed while no active term looks at a teacher.
            labels: (B,) classes or values, or (B, T) token labels; -100 takes no part. None leaves the task term out.
            shares: a factor () for every term: what this batch, a part of an optimizer step, counts for in it
                (`fakit.training.token_counts`).
            written: the student wrote the labeled tokens itself (on-policy). Labels then say which tokens count, and
                are no answers: terms that need labels are off.

        Returns:
            Breakdown, whose `.total` one calls `.backward()` on.
        """
        for side, trace in (("student", student), ("teacher", teacher)):
            if not isinstance(trace, Trace) and not (trace is None and side == "teacher"):
                raise ValueError(
                    f"the {side}'s side is a {type(trace).__name__}, and a Trace was expected: capture(model, batch, "
                    f"**objective.needs({side!r}).asked()) gives one."
                )
        if teacher is None and self.needs_teacher():
            raise ValueError(
                f"the objective {dict(self.weights)} compares with a teacher, and no teacher trace was given."
            )
        if not self.stepped and torch.is_grad_enabled():
            self._refuse_without_step()
        teacher = None if teacher is None else teacher.detach()
        labels = student.own_labels(labels)
        answered = labels is not None and not written
        active = {n: t for n, t in self._terms.items() if self.active(n) and (answered or not t.needs_labels)}
        weights = {name: self.weights[name] for name in active}
        factors: dict[str, Tensor] = {}
        if self.balancing is not None:
            if torch.is_grad_enabled():
                self.balancing.measure(self._step, weights, lambda: self._raw(active, student, teacher, labels))
            factors = self.factors = self.balancing.factors(weights)
        scales = dict(shares or {})
        scales |= {name: factor * scales.get(name, 1.0) for name, factor in factors.items()}
        found = compare(active, self.weights, student, teacher, labels, scales)
        values, per_layer = found.values, found.per_layer
        if not values:
            raise ValueError(
                f"nothing to compute: weights {dict(self.weights)}, {len(self.layer_map)} layer pairs, "
                f"labels {'given' if labels is not None else 'missing'}. Raise a weight, map a layer, or pass labels."
            )
        if shares is not None:
            values = {name: shares[name] * value for name, value in values.items()}
            per_layer = {n: {pair: shares[n] * v for pair, v in pairs.items()} for n, pairs in per_layer.items()}
        weighted = {name: weights[name] * value for name, value in values.items()}
        rest = {name: value for name, value in weighted.items() if name not in found.at_once}
        if self.balancing is not None:
            costs = {name: weights[name] * self.balancing.cost(name, v.detach()) for name, v in values.items()}
            weighted = {name: factors[name] * value + costs[name] for name, value in weighted.items()}
            rest = {name: costs[name] if name in found.at_once else value for name, value in weighted.items()}
        # what went over the heads is in `together`: the same number, whose gradient is there already
        loss = total(weighted.values()) if found.together is None else found.together + sum(rest.values())
        matches = {pair: heads for term in active.values() for pair, heads in term.place.matches.items()}
        breakdown = Breakdown(loss, values, weighted, per_layer, matches)
        # looking at a number on an accelerator would stop its stream in every step; there the trainer looks when it
        # logs
        if breakdown.total.device.type == "cpu" and not torch.compiler.is_compiling():
            breakdown.check(lambda name, pairs: whose_numbers(self._terms[name], pairs, student, teacher))
        return breakdown

    def _raw(self, active: Mapping[str, Term], student: Trace, teacher: Trace | None, labels) -> dict[str, Tensor]:
        """The terms before weighting, with graph; what a term keeps from batch to batch stays as it is."""
        training = self.projections.training
        self.projections.eval()
        try:
            return compare(active, self.weights, student, teacher, labels, {}).values
        finally:
            self.projections.train(training)

    def _refuse_without_step(self) -> None:
        asking = [*self.schedules, *(["balancing"] if self.balancing is not None and self.balancing.by_step else [])]
        if asking:
            raise ValueError(
                f"{', '.join(asking)}: by the optimizer step, and which one this is was not said, so that nothing "
                "would ever change. Call objective.set_step(step, of=steps) before each step; DistillationTrainer does "
                "it."
            )


def _named(terms: Mapping[str, Term] | None) -> dict[str, Term]:
    for name in terms or {}:
        check_name(name, f"terms={{{name!r}: …}}")
    return dict(terms or {})


def check_name(name: object, where: str) -> None:
    """Raise ValueError, with `where` in front, for a name that a further term cannot have."""
    if not isinstance(name, str) or not name.isidentifier() or name in OWN:
        raise ValueError(
            f"{where}: a further term has a name of its own, of letters, digits and underscores, that is none of "
            f"{', '.join(OWN)}."
        )


def _check_term(name: str, term: object) -> None:
    if not isinstance(term, Term):
        made = f" Write {term.__name__}(…)." if isinstance(term, type) and issubclass(term, Term) else ""
        raise ValueError(f"{name} is {term!r}; a term is a Features, Attention, Outputs, Task or another Term.{made}")
