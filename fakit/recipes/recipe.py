"""`Recipe`: what a paper minimizes, as data in the words of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fakit import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fakit.layer_maps import Depths
    from fakit.objective.objective import Objective

#: What a recipe sets; it leaves out what it does not use.
KEYS = ("layer_map", "features", "attention", "outputs", "task_weight", "terms")


@dataclass(frozen=True, repr=False)
class Recipe:
    """A published objective: its equation, its settings, and what of it is ours.

    Attributes:
        name: of the function that gives it, and of `recipe:` in a configuration.
        title, source: of the paper or the code that it is taken from.
        equation: what is minimized, in TeX.
        settings: the same by the keys of a configuration: `layer_map`, `features`, `attention`, `outputs`,
            `task_weight`, `terms`. A term that is not named is left out.
        published: what else the source says of its training. It is shown, and not set.
        ours: in what the settings differ from the source, or fill what it leaves open.
        evidence: what the source, or another, measured.
    """

    name: str
    title: str
    source: str
    equation: str
    settings: Mapping[str, Any]
    published: Mapping[str, str] = field(default_factory=dict)
    ours: tuple[str, ...] = ()
    evidence: str = ""

    @property
    def configuration(self) -> dict[str, Any]:
        """All of `KEYS`, those that the recipe does not use as None: what `recipe:` stands for in a configuration."""
        unused = {"layer_map": "uniform", "terms": {}}
        return {key: _copy(self.settings.get(key, unused.get(key))) for key in KEYS}

    def build(self, student_layers: Depths, teacher_layers: Depths, seed: int = 0) -> Objective:
        """The objective for models of these depths; of encoder-decoders those of encoder and decoder.

        Args:
            seed: of random layer maps.

        Raises:
            ValueError: depths that the recipe's layer maps do not fit.
        """
        from fakit.layer_maps import LayerMap
        from fakit.objective.attention import Attention
        from fakit.objective.feature_terms import KINDS
        from fakit.objective.features import Features
        from fakit.objective.objective import Objective
        from fakit.objective.outputs import Outputs
        from fakit.objective.schedules import from_file
        from fakit.objective.task import Task

        kinds = {"features": Features, "attention": Attention, "outputs": Outputs, **KINDS}

        def map_of(given):
            return LayerMap.named(given, student_layers, teacher_layers, seed=seed)

        def term(kind: str, settings: Mapping[str, Any] | None):
            if settings is None:
                return None
            own = {key: from_file(value) for key, value in settings.items() if key != "kind"}
            if "layer_map" in own:
                own["layer_map"] = map_of(own["layer_map"])
            return kinds[kind](**own)

        found = self.configuration
        return Objective(
            map_of(found["layer_map"]),
            **{name: term(name, found[name]) for name in ("features", "attention", "outputs")},
            task=None if found["task_weight"] is None else Task(weight=from_file(found["task_weight"])),
            terms={name: term(settings["kind"], settings) for name, settings in found["terms"].items()},
        )

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> Objective:
        """The objective between two models, with projections where their widths differ.

        Args:
            student, teacher: transformers models.
            seed: of random layer maps.

        Raises:
            ValueError: depths that the recipe's layer maps do not fit.
        """
        from fakit.models.blocks import stack_depths

        objective = self.build(stack_depths(student), stack_depths(teacher), seed)
        return objective.prepare(*(model.config.get_text_config().hidden_size for model in (student, teacher)))

    @property
    def _formula(self) -> str:
        return " ".join(self.equation.split())

    def to_yaml(self) -> str:
        """What `recipe: name` stands for in a configuration."""
        require("study", "yaml")
        import yaml

        return yaml.safe_dump(
            {"recipe": self.name, **_copy(self.settings)}, sort_keys=False, allow_unicode=True, default_flow_style=None
        )

    def __str__(self) -> str:
        said = [f"{self.title}\n{self.source}", f"minimizes  {self._formula}", f"settings\n{_indented(self.to_yaml())}"]
        said += ["published\n" + _listed(f"{key}: {value}" for key, value in self.published.items())] * bool(
            self.published
        )
        said += [f"ours\n{_listed(self.ours)}"] * bool(self.ours)
        said += [f"evidence\n  {self.evidence}"] * bool(self.evidence)
        return "\n\n".join(said)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        said = [f"**{self.title}** ({self.source})", f"$$\n{self._formula}\n$$", f"```yaml\n{self.to_yaml()}```"]
        said += [f"Published beside it: {'; '.join(f'{k}: {v}' for k, v in self.published.items())}."] * bool(
            self.published
        )
        said += ["Ours:\n\n" + "\n".join(f"* {line}" for line in self.ours)] * bool(self.ours)
        said += [f"Evidence: {self.evidence}"] * bool(self.evidence)
        return "\n\n".join(said)


def _copy(value: Any) -> Any:
    """Plain dictionaries and lists, which a configuration may change and YAML can write."""
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def _listed(lines) -> str:
    return "\n".join(f"  - {line}" for line in lines)
