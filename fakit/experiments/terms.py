"""The terms of an experiment as a YAML file has them: every setting of the term classes, and further terms by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fakit.experiments.schema import Section, describe, did_you_mean, option
from fakit.layer_maps import LayerMap
from fakit.losses import features as feature_losses
from fakit.losses import outputs as output_losses
from fakit.objective.objective import check_name
from fakit.objective.term import Term
from fakit.objective.terms import ATTENTION_LOSSES, HEADS, Attention, Features, Outputs

LAYER_MAPS = ("uniform", "last", "first", "skip", "reverse", "all_to_one", "random", "none")
Pairs = tuple[tuple[int, int], ...]
# A strategy's name or explicit pairs → the layer map between the two models.
MapOf = Callable[[str | Pairs], LayerMap]


class TermSection(Section):
    """What the three have in common. Keys that are the loss's own parameters go into `parameters`."""

    made: ClassVar[type[Term]]
    losses: ClassVar[Mapping[str, Any]] = {}
    shown: ClassVar[tuple[str, ...]] = ()  # in a file always; others only where they differ, so that run ids stay

    @classmethod
    def from_dict(cls, data):
        """As `Section.from_dict`; a parameter of the loss, such as jsd's beta, is a key like any other."""
        loss = cls.losses.get(data.get("loss", "")) if isinstance(data, Mapping) else None
        keys = cls.keys()
        if loss is None or "parameters" not in keys:
            return super().from_dict(data)
        own = [name for name in inspect.signature(loss).parameters if name in data and name not in keys]
        rest = {key: value for key, value in data.items() if key not in own}
        if own:
            rest["parameters"] = {**rest.get("parameters", {}), **{name: data[name] for name in own}}
        return super().from_dict(rest)

    def to_dict(self):
        """Without the settings that are as they would be anyway."""
        plain = super().to_dict()
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        kept = {k: v for k, v in plain.items() if k in self.shown or v not in (_listed(defaults[k]), {})}
        return {k: v for k, v in kept.items() if k != "parameters"} | kept.get("parameters", {})

    def _check(self) -> None:
        try:
            self.build(_without_models)
        except ValueError as error:
            raise ValueError(f"{self.section}: {error}") from error

    def build(self, map_of: MapOf) -> Term:
        """The term. `map_of` makes a layer map of a strategy's name or of pairs."""
        settings = {name: getattr(self, name) for name in self.keys()}
        if settings.get("layer_map") is not None:
            settings["layer_map"] = map_of(settings["layer_map"])
        return self.made(**settings)


@dataclass(frozen=True)
class FeaturesConfig(TermSection):
    """Hidden-state matching over the mapped layers."""

    section: ClassVar[str] = "features"
    old_names: ClassVar[Mapping[str, str]] = feature_losses.OLD_NAMES
    made = Features
    losses = feature_losses.LOSSES
    shown = ("loss", "weight")

    loss: str = option("mse", choices=tuple(feature_losses.LOSSES))
    weight: float = option(1.0, at_least=0.0)
    projection: str | None = option("linear", choices=("linear",))
    layer_map: str | tuple[tuple[int, int], ...] | None = option(None, choices=LAYER_MAPS)  # null: the experiment's
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionConfig(TermSection):
    """Attention-map matching over the mapped layers."""

    section: ClassVar[str] = "attention"
    made = Attention
    losses = ATTENTION_LOSSES
    shown = ("loss", "weight", "heads")

    loss: str = option("kl", choices=tuple(ATTENTION_LOSSES))
    weight: float = option(1.0, at_least=0.0)
    heads: str = option("one-to-one", choices=HEADS)
    relations: tuple[str, ...] = ("queries", "keys", "values")
    relation_heads: int | None = option(None, at_least=1)
    layer_map: str | tuple[tuple[int, int], ...] | None = option(None, choices=LAYER_MAPS)  # null: the experiment's


@dataclass(frozen=True)
class OutputsConfig(TermSection):
    """Output-distribution matching at a temperature."""

    section: ClassVar[str] = "outputs"
    made = Outputs
    losses = output_losses.LOSSES
    shown = ("loss", "temperature", "weight")

    loss: str = option("forward_kl", choices=tuple(output_losses.LOSSES))
    temperature: float = option(2.0, above=0.0)
    weight: float = option(1.0, at_least=0.0)
    vocab_size: int | None = option(None, at_least=1)
    chunked: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        if self.temperature < 1e-3:  # logits over it leave float32
            raise ValueError(
                f"{self.section}.temperature: found {self.temperature:g}, expected a value of 0.001 at least."
            )
        super()._check()


KINDS = {"features": FeaturesConfig, "attention": AttentionConfig, "outputs": OutputsConfig}


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
            f"terms.{name}: found {describe(given)}, expected a mapping with a kind: {', '.join(KINDS)}, or "
            "package.module:Class."
        )
    kind, settings = given["kind"], {key: value for key, value in given.items() if key != "kind"}
    if kind in KINDS:
        named = type(KINDS[kind].__name__, (KINDS[kind],), {"section": f"terms.{name}"})
        return named.from_dict(settings).build(map_of)
    made = _class_of(name, kind)
    if settings.get("layer_map") is not None:
        settings["layer_map"] = map_of(settings["layer_map"])
    try:
        return made(**settings)
    except TypeError as error:
        takes = ", ".join(inspect.signature(made).parameters)
        raise ValueError(
            f"terms.{name}: {kind} takes {takes}; found {', '.join(settings) or 'nothing'} ({error})."
        ) from error
    except ValueError as error:
        raise ValueError(f"terms.{name}: {error}") from error


def _class_of(name: str, kind: str) -> type[Term]:
    module, colon, attribute = kind.partition(":")
    if not colon:
        raise ValueError(
            f"terms.{name}.kind: {kind!r} is not one of {', '.join(KINDS)}, and no "
            f"package.module:Class.{did_you_mean(kind, KINDS)}"
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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
