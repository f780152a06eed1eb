"""The four terms of the objective and their settings: what is compared, how, and with which weight. They stay as they are made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fakit.layer_maps import LayerMap
from fakit.losses import attention as attention_losses
from fakit.losses import features as feature_losses
from fakit.losses import outputs as output_losses

# Relations have no maps in the sense of the others: the objective compares them itself.
ATTENTION_LOSSES = attention_losses.LOSSES | {"relations": None}
HEADS = ("one-to-one", "group-mean", "best-match")


class FrozenTermError(ValueError, AttributeError):
    """A setting of a term that was changed after the term was made."""


class _Term:
    """Settings that stay as they were made: the objective, its needs, the projections and a cache were made from them."""

    _settable: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: object) -> None:
        if getattr(self, "_made", False) and name not in self._settable:
            kind = type(self).__name__
            instead = (
                f"objective.weights[{kind.lower()!r}] = {value!r} changes the weight"
                if name == "weight"
                else f"make a new one and a new Objective with it: Objective(…, {kind.lower()}={kind}(…, {name}=…))"
            )
            raise FrozenTermError(
                f"{kind}.{name} is {getattr(self, name, None)!r} and cannot be set once the term is made; {instead}."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenTermError(f"{type(self).__name__}.{name} cannot be deleted.")


@dataclass
class Features(_Term):
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
        self._made = True


@dataclass
class Attention(_Term):
    """Attention alignment over the mapped layers (layer 0 has none and is left out).

    Args:
        loss: "kl" or "mse" of the maps, "relations" (MiniLMv2: KL of softmax(X Xᵀ/√d_r) for queries, keys and values), or any function
            (student maps, teacher maps, mask) of (B, H, T, T) tensors. The named ones never hold a T × T map where both models hand over
            their queries and keys; a function is given the maps in full.
        weight: β.
        heads: how maps of unequal head counts are compared. "one-to-one" compares head h with head h and needs equal counts; "group-mean"
            first averages neighbouring heads of the side that has more; "best-match" gives each student head the teacher head that it is
            closest to in this batch (greedily, each teacher head once while there are others): see `Breakdown.heads`.
        relations: which of "queries", "keys" and "values" the relations are of.
        relation_heads: R; the largest number up to the student's heads that divides both widths unless given.
        layer_map: for this term alone; the objective's unless given.
    """

    loss: str | Callable = "kl"
    weight: float = 1.0
    heads: str = "one-to-one"
    relations: tuple[str, ...] = ("queries", "keys", "values")
    relation_heads: int | None = None
    layer_map: LayerMap | None = None

    def __post_init__(self):
        self.function = _choose("Attention", self.loss, ATTENTION_LOSSES)
        if self.heads not in HEADS:
            raise ValueError(
                f"Attention(heads={self.heads!r}) is not known; choose 'one-to-one', 'group-mean' or 'best-match'."
            )
        self.relations = tuple(self.relations)
        if not self.relations or not set(self.relations) <= {"queries", "keys", "values"}:
            raise ValueError(
                f"Attention(relations={self.relations!r}): relations are of 'queries', 'keys' and 'values', one or more of them."
            )
        self._made = True


@dataclass
class Outputs(_Term):
    """Output-distribution matching.

    Args:
        loss: "forward_kl", "reverse_kl", "jsd", "logit_mse", or any function (student logits, teacher logits, mask, temperature).
        temperature: τ > 0, may be set at any time, also as `objective.temperature`.
        weight: γ.
        vocab_size: cut both vocabularies to their first `vocab_size` entries, for families that pad the head differently.
        chunked: over a large vocabulary, make and compare logits a chunk of tokens at a time, where both models have a plain linear head
            and the loss is one of the named; the same number with a fraction of the memory. False always makes them whole.
    """

    _settable: ClassVar[frozenset[str]] = frozenset({"temperature"})

    loss: str | Callable = "forward_kl"
    temperature: float = 2.0
    weight: float = 1.0
    vocab_size: int | None = None
    chunked: bool = True

    def __post_init__(self):
        self.function = _choose("Outputs", self.loss, output_losses.LOSSES)
        self._made = True

    def __setattr__(self, name: str, value: object) -> None:
        if name == "temperature" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"Outputs(temperature={value!r}): a temperature is finite and above 0.")
        super().__setattr__(name, value)


@dataclass
class Task(_Term):
    """The task's own loss on the labels: cross-entropy (labels of -100 are left out), or mean squared error for one regression output.

    Args:
        weight: δ.
    """

    weight: float = 1.0

    def __post_init__(self):
        self._made = True


def _choose(term: str, loss: str | Callable, known: dict[str, Callable]) -> Callable:
    if callable(loss):
        return loss
    if loss not in known:
        raise ValueError(f"{term}({loss!r}) is not known; choose one of {list(known)} or pass a function.")
    return known[loss]
