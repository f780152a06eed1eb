"""The sections of a file that say how a teacher is made smaller: layer by layer, or by pairs of thin matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fakit.compression.importance import MEASURES
from fakit.compression.ranks import METHODS as RANKS
from fakit.experiments.schema import Count, Natural, Number, Section, Truth


class LayerwiseConfig(Section):
    """Layers taken out one a round, healing after each: see `fakit.compression.layerwise.prune`."""

    section: ClassVar[str] = "layerwise"
    layers: Count | None = 3  # the depth to stop at
    at_least: Number | None = None  # stop before the round that would fall below this validation score
    importance: Literal[MEASURES] = "kl"  # "quality" is the task's headline metric on the validation texts
    one_shot: Truth = False  # all layers in one round, as a comparison
    scored: Count = 256  # training texts that layers are scored on
    steps: Natural = 100  # of healing, for each layer that is taken out
    batch_size: Count = 32
    learning_rate: Annotated[Number, Field(gt=0.0)] = 1e-4
    bf16: Truth | Literal["auto"] = "auto"

    def _check(self) -> None:
        if self.layers is None and self.at_least is None:
            raise ValueError("layerwise.layers and layerwise.at_least: both are null; one of them says when to stop.")
        if self.one_shot and (self.layers is None or self.at_least is not None):
            raise ValueError("layerwise.one_shot: takes out all layers at once; give layerwise.layers and no at_least.")


class LowRankConfig(Section):
    """Weights as pairs of thin matrices, distilled block by block: see `fakit.compression.low_rank`."""

    section: ClassVar[str] = "low_rank"
    keep: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.8  # of the model's parameters
    ranks: Literal[RANKS] = "bottom"  # whose rank goes down first
    lowest: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.25  # rank, as a share of the highest that saves something
    start: Literal["activations", "weights"] = "activations"  # what the pairs are made of
    calibration: Count = 400  # texts that activations are measured on
    texts: Count = 2000  # texts that blocks are distilled on, of the pool first
    epochs: Natural = 2  # 0: no distillation
    batch_size: Count = 32
    learning_rate: Annotated[Number, Field(gt=0.0)] = 1e-3
    bf16: Truth | Literal["auto"] = "auto"

    def _check(self) -> None:
        if self.ranks == "energy" and self.start == "weights":
            raise ValueError(
                "low_rank.ranks: energy is measured on texts; low_rank.start: activations, or other ranks."
            )
