"""The terms of an experiment as a YAML file has them: every setting of the term classes, and further terms by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, create_model

from fakit.experiments.schema import (
    Count,
    Natural,
    Number,
    Section,
    Truth,
    Weight,
    Whole,
    describe,
    did_you_mean,
    kinds_of,
)
from fakit.layer_maps import STRATEGIES, LayerMap
from fakit.losses import features as feature_losses
from fakit.losses import outputs as output_losses
from fakit.objective.attention import ATTENTION_LOSSES, Attention
from fakit.objective.feature_terms import KINDS as FEATURE_TERMS
from fakit.objective.features import Features
from fakit.objective.objective import check_name
from fakit.objective.outputs import Outputs
from fakit.objective.schedules import Kind, Schedule, from_file
from fakit.objective.term import Term

Pairs = tuple[tuple[int, int], ...]
KEPT = "kept"  # a map: the teacher layer that each student layer was, and the last for the last
MapInAFile = Literal[*STRATEGIES, KEPT] | tuple[tuple[Whole, Whole], ...]
# A strategy's name, "kept" or explicit pairs → the layer map between the two models.
MapOf = Callable[[str | Pairs], LayerMap]


Share = Annotated[Number, Field(gt=0.0, lt=1.0)]  # of training


class ScheduleSection(Section):
    """A number that changes over training, in place of a number: {from: 1.0, to: 0.1, kind: cosine}."""

    def to_dict(self):
        """Without what is as it would be anyway."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {
            key: value
            for key, value in super().to_dict().items()
            if key in ("from", "to", "kind") or getattr(self, key) != defaults[key]
        }

    def _check(self) -> None:
        try:
            self.build()
        except ValueError as error:
            raise ValueError(f"{self.section}: {error}") from error

    def build(self) -> Schedule:
        """The schedule."""
        return Schedule.from_dict(self.to_dict())


def schedule_at(path: str) -> type[ScheduleSection]:
    """The schema of a schedule that stands at a key of a file."""
    fields = {
        "from": (Number, ...),
        "to": (Number, ...),
        "kind": (Kind, "linear"),
        "start": (Natural | Share, 0),
        "end": (Count | Share | None, None),
        "milestones": (tuple[Whole | Share, ...], ()),
    }
    section = create_model("ScheduleSection", __base__=ScheduleSection, __module__=__name__, **fields)
    section.section = path
    return section


def built(value: Any) -> Any:
    """A setting of a configuration, or the schedule that stands in its place; also where no schema has looked at it:
    a class of one's own may take mappings of other keys.
    """
    return value.build() if isinstance(value, ScheduleSection) else from_file(value)


def highest(weight: Any) -> float:
    """Of a weight over training."""
    weight = built(weight)
    return weight.highest if isinstance(weight, Schedule) else weight


def times(factor: float, weight: Any) -> Any:
    """A weight of a configuration times a factor, a schedule at both of its ends."""
    weight = built(weight)
    if not isinstance(weight, Schedule):
        return factor * weight
    return {**weight.to_dict(), "from": factor * weight.start_value, "to": factor * weight.end_value}


class TermSection(Section):
    """A term in a file, every setting of its class. Keys that are the loss's own parameters go into `parameters`."""

    made: ClassVar[type[Term]]
    losses: ClassVar[Mapping[str, Any]]
    shown: ClassVar[tuple[str, ...]]  # in a file always; others only where they differ, so that run ids stay

    @classmethod
    def _by_current_names(cls, data):
        """As `Section`; a parameter of the loss, such as jsd's beta, is a key like any other."""
        data, keys = super()._by_current_names(data), cls.keys()
        loss = cls.losses.get(data["loss"]) if isinstance(data.get("loss"), str) else None
        if loss is None or "parameters" not in keys:
            return data
        own = {key: data.pop(key) for key in inspect.signature(loss).parameters if key in data and key not in keys}
        return {**data, "parameters": {**data.get("parameters", {}), **own}} if own else data

    def to_dict(self):
        """Without the settings that are as they would be anyway."""
        own = {key: value for key, value in super().to_dict().items() if key in self.shown or not self._is_default(key)}
        return {key: value for key, value in own.items() if key != "parameters"} | own.get("parameters", {})

    def _is_default(self, key: str) -> bool:
        return getattr(self, key) == type(self).model_fields[key].default

    def _check(self) -> None:
        temperature = built(getattr(self, "temperature", 1.0))
        lowest = temperature.lowest if isinstance(temperature, Schedule) else temperature
        if lowest < 1e-3:  # logits over it leave float32
            raise ValueError(f"{self.section}.temperature: found {lowest:g}, expected a value of 0.001 at least.")
        try:
            self.build(_without_models)
        except ValueError as error:
            raise ValueError(f"{self.section}: {error}") from error

    def build(self, map_of: MapOf) -> Term:
        """The term. `map_of` makes a layer map of a strategy's name or of pairs."""
        settings = {name: built(getattr(self, name)) for name in self.keys()}
        if "parameters" in settings:
            settings["parameters"] = {key: built(value) for key, value in settings["parameters"].items()}
        if settings.get("layer_map") is not None:
            settings["layer_map"] = map_of(settings["layer_map"])
        return self.made(**settings)


# What a file may say where a signature says no more than the type.
IN_A_FILE: dict[Any, Any] = {
    bool: Truth,
    int: Count,
    float: Weight,
    LayerMap: MapInAFile,
    tuple[str, ...]: tuple[str, ...],
}
TEMPERATURE = Annotated[Number, Field(gt=0.0)]


def section_of(
    made: type[Term],
    losses: Mapping[str, Any],
    shown: tuple[str, ...],
    old_names: Mapping[str, str] | None = None,
    path: str | None = None,
) -> type[TermSection]:
    """The schema of a term class at a key of a file: its signature, where a loss is one of the named."""
    fields, path = {}, path or made.__name__.lower()
    for name, parameter in inspect.signature(made).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        schedule = schedule_at(f"{path}.{name}")
        own = {"loss": [Literal[*losses]], "temperature": [TEMPERATURE, schedule], "parameters": [dict[str, Any]]}
        kinds = own.get(name) or kinds_of(parameter.annotation)
        hint = Union[*(schedule if kind is Schedule else IN_A_FILE.get(kind, kind) for kind in kinds)]
        fields[name] = hint, {} if name == "parameters" else parameter.default
    section = create_model(
        f"{made.__name__}Config", __base__=TermSection, __module__=__name__, __doc__=made.__doc__, **fields
    )
    section.made, section.losses, section.shown = made, losses, shown
    section.section, section.old_names = path, old_names or {}
    return section


@cache
def at_path(kind: type[TermSection], path: str) -> type[TermSection]:
    """The schema of a further term, whose errors name its own key."""
    return section_of(kind.made, kind.losses, kind.shown, kind.old_names, path)


FeaturesConfig = section_of(Features, feature_losses.LOSSES, ("loss", "weight"), old_names=feature_losses.OLD_NAMES)
AttentionConfig = section_of(Attention, ATTENTION_LOSSES, ("loss", "weight", "heads"))
OutputsConfig = section_of(Outputs, output_losses.LOSSES, ("loss", "temperature", "weight"))
KINDS = {"features": FeaturesConfig, "attention": AttentionConfig, "outputs": OutputsConfig}
KNOWN = (*KINDS, *FEATURE_TERMS)


def check_further_terms(terms: Mapping[str, Any]) -> None:
    """Raise ValueError, by the key's path, for a further term that cannot be made."""
    for name, given in terms.items():
        check_name(name, f"terms.{name}")
        build_further_term(name, given, _without_models)


def build_further_term(name: str, given: Any, map_of: MapOf) -> Term:
    """A term of `terms:` in a file: a kind of the kit's, or a class of one's own as "package.module:Class",
    and its settings.

    Raises:
        ValueError: no mapping with a kind, a kind or a class that is not there, settings that it does not take.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise ValueError(
            f"terms.{name}: found {describe(given)}, expected a mapping with a kind: {', '.join(KNOWN)}, or "
            "package.module:Class."
        )
    kind, settings = given["kind"], {key: value for key, value in given.items() if key != "kind"}
    if kind in KINDS:
        return at_path(KINDS[kind], f"terms.{name}").from_dict(settings).build(map_of)
    made = _class_of(name, kind)
    if settings.get("layer_map") is not None:
        settings["layer_map"] = map_of(settings["layer_map"])
    try:
        return made(**{key: built(value) for key, value in settings.items()})
    except TypeError as error:
        takes = ", ".join(inspect.signature(made).parameters)
        raise ValueError(
            f"terms.{name}: {kind} takes {takes}; found {', '.join(settings) or 'nothing'} ({error})."
        ) from error
    except ValueError as error:
        raise ValueError(f"terms.{name}: {error}") from error


def _class_of(name: str, kind: str) -> type[Term]:
    if kind in FEATURE_TERMS:
        return FEATURE_TERMS[kind]
    module, colon, attribute = kind.partition(":")
    if not colon:
        raise ValueError(
            f"terms.{name}.kind: {kind!r} is not one of {', '.join(KNOWN)}, and no "
            f"package.module:Class.{did_you_mean(kind, KNOWN)}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"terms.{name}.kind: {module!r} cannot be imported here: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ValueError(f"terms.{name}.kind: {kind} is {found!r}; expected a subclass of fakit.Term.")
    return found


def _without_models(given: str | Pairs) -> LayerMap:
    """Pairs are looked at before there are models; what a strategy makes of the models is not known yet."""
    return LayerMap.none() if isinstance(given, str) else LayerMap(given)
