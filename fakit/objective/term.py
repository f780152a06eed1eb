"""What a term of the objective is: what it needs of the models, what it compares, and what its mean is over."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fakit.layer_maps import Depths, LayerMap, Pair
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.schedules import Schedule, at_step, scheduled
from fakit.tracing.trace import Trace


class FrozenTermError(ValueError, AttributeError):
    """A setting of a term that was changed after the term was made."""


@dataclass
class Place:
    """A term's place in one objective.

    Attributes:
        name: the term's there.
        layer_map: its own, or the objective's; of random maps the one drawn last.
        modules: all of the objective's trainable modules, by name.
        matches: heads matched in the call at hand.
        schedules: the settings that change with the step, as they were written: a Schedule, or parameters with one.
        step, steps: optimizer steps done, and in all; None until they are said.
    """

    name: str
    layer_map: LayerMap
    modules: nn.ModuleDict
    matches: dict[Pair, Tensor] = field(default_factory=dict)
    schedules: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    steps: int | None = None


class Term:
    """A part of the objective: L = Σ weight · term. A subclass says what it needs and compares;
    the objective does the rest.

    Four methods make a term, the first two of them always:

    * `needs(side)`: what `capture` must keep of "student" or "teacher".
    * `compare(student, teacher, labels)`: the loss of two traces, a mean over what counts; by layer pair where it has
      pairs.
    * `count(batch)`: what that mean is over, so that means over several batches and processes are exact; tokens unless
      overridden.
    * `cached()`: what a teacher cache must store for it; what it needs of the teacher unless overridden.

    A term stays as it was made: the objective takes a copy, whose weight is `objective.weights[name]`. Any of its
    numbers may be a `Schedule`; there it is the number of the step.

    >>> class LastToken(Term):
    ...     def needs(self, side):
    ...         return Needs(hidden_states=[2 if side == "student" else 6])
    ...
    ...     def compare(self, student, teacher, labels):
    ...         ours, theirs = student.hidden_states[2][:, -1], teacher.hidden_states[6][:, -1]  # (B, d)
    ...         return 1 - nn.functional.cosine_similarity(ours, theirs).mean()
    ...
    ...     def count(self, batch):
    ...         return batch.texts
    """

    weight: float | Schedule = 1.0
    layer_map: LayerMap | None = None
    #: True where there is nothing to compare without labels.
    needs_labels: bool = False
    #: True where both models must have been given the same tokens; False: the teacher's tokenizer may be its own.
    same_tokens: bool = True
    #: Settings that may be set in an objective at any time, as its weight may.
    settable: ClassVar[frozenset[str]] = frozenset()
    _place: Place

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def needs(self, side: str) -> Needs:
        """What `capture` must keep of "student" or "teacher": `Needs`, or the same as a dictionary."""
        raise NotImplementedError(f"{type(self).__name__}.needs(side) says what capture must keep; it is not written.")

    def compare(self, student: Trace, teacher: Trace | None, labels: Tensor | None) -> Tensor | dict[Pair, Tensor]:
        """The loss, a scalar () with graph; by layer pair where there are pairs, which `shares` weighs.
        {} where there is nothing to compare.

        Args:
            student: with graph.
            teacher: detached; None only where no term needs it.
            labels: (B,), (B, C) or (B, T); None without.
        """
        raise NotImplementedError(f"{type(self).__name__}.compare(student, teacher, labels) is not written.")

    def count(self, batch: CountedBatch) -> Tensor:
        """What the mean is over, up to a constant factor: () int64."""
        return batch.tokens

    def cached(self) -> Needs:
        """What a teacher cache must store for it, whatever its weight, in every epoch."""
        return Needs.of(self.needs("teacher"), f"{type(self).__name__}")

    def shares(self) -> dict[Pair, float]:
        """What each layer pair that `compare` returns counts for; they sum to 1. {}: all the same."""
        return {}

    def prepare(self, student_width: int, teacher_width: int) -> None:
        """Make what is trained with the student (`place.modules`), before the optimizer is built."""

    def check_layers(self, student_layers: Depths, teacher_layers: Depths) -> None:
        """Raise ValueError where a layer is asked for that one of the models does not have."""
        if self.layer_map is not None:
            self.layer_map.check(student_layers, teacher_layers)

    # -- what it has in an objective ----------------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        """Name, layer map and modules in the objective that holds it.

        Raises:
            ValueError: it is in none.
        """
        if "_place" not in vars(self):
            raise ValueError(
                f"{type(self).__name__} is in no objective, so it has no layer map and no modules there: Objective(…, "
                "terms={'name': term})."
            )
        return self._place

    def placed(self, name: str, layer_map: LayerMap, modules: nn.ModuleDict) -> Self:
        """A copy that stands in an objective. The one that was given is frozen, too:
        what is changed there would be lost.
        """
        vars(self)["_made"] = True
        placed = copy.copy(self)
        own = self.layer_map
        for given, of in ((own, f"{type(self).__name__}(layer_map=…)"), (layer_map, "Objective(layer_map, …)")):
            if given is not None and not isinstance(given, LayerMap):
                raise ValueError(
                    f"{of} is a LayerMap, such as LayerMap.uniform(S, T) or LayerMap([(1, 2), (2, 4)]); found "
                    f"{given!r}."
                )
        changing = {name: value for name, value in vars(self).items() if scheduled(value)}
        vars(placed)["_place"] = Place(name, layer_map if own is None else own, modules, schedules=changing)
        vars(placed).update(at_step(changing, 0))
        return placed

    def set_step(self, step: int, steps: int | None) -> None:
        """Put what is scheduled at its number of a step."""
        self.place.step, self.place.steps = step, steps
        vars(self).update(at_step(self.place.schedules, step, steps))

    def written(self, setting: str) -> Any:
        """A setting as it was written: the Schedule, where it is one."""
        now = getattr(self, setting)
        return self._place.schedules.get(setting, now) if "_place" in vars(self) else now

    def write(self, setting: str, value: Any) -> None:
        """Set what may be set at any time, to a number or a Schedule; it replaces the Schedule that was there."""
        place = self.place
        if isinstance(value, Schedule):
            if place.step is not None:
                value.until(place.steps)
            place.schedules[setting] = value
        else:
            place.schedules.pop(setting, None)
        vars(self)[setting] = at_step(value, place.step or 0, place.steps)

    def describe(self) -> dict[str, Any]:
        """Its settings by name, as they were written, without the weight."""
        names = (
            [f.name for f in fields(self)] if is_dataclass(self) else [n for n in vars(self) if not n.startswith("_")]
        )
        return {name: self.written(name) for name in names if name != "weight"}

    def __setattr__(self, name: str, value: object) -> None:
        if "_place" in vars(self) and name in self.settable:
            self.write(name, value)
            return
        if vars(self).get("_made"):
            kind, known = (
                type(self).__name__,
                self._place.name if "_place" in vars(self) else type(self).__name__.lower(),
            )
            if name == "weight":
                instead = f"objective.weights[{known!r}] = {value!r} changes the weight"
            elif name in self.settable:
                instead = f"objective.{name} = {value!r} changes it"
            else:
                instead = f"make a new one and a new Objective with it: Objective(…, {known}={kind}(…, {name}=…))"
            raise FrozenTermError(
                f"{kind}.{name} is {getattr(self, name, None)!r} and cannot be set once the term is made; {instead}."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenTermError(f"{type(self).__name__}.{name} cannot be deleted.")


def choose(term: str, loss: str | Callable, known: Mapping[str, Any]) -> Callable:
    """The function of a named loss, or the function that was given.

    Raises:
        ValueError: an unknown name.
    """
    if callable(loss):
        return loss
    if loss not in known:
        raise ValueError(f"{term}({loss!r}) is not known; choose one of {list(known)} or pass a function.")
    return known[loss]


def normalized(shares: Mapping[Pair, float]) -> dict[Pair, float]:
    """Weights above 0, divided by their sum."""
    total = sum(shares.values())
    return {pair: share / total for pair, share in shares.items() if share > 0}
