"""What a cache keeps of a teacher, and whether that is enough for an objective."""

from dataclasses import dataclass

from fakit.objective.objective import Objective
from fakit.training.teacher_cache.packing import PRECISIONS

INPUTS = ("queries", "keys", "values")


@dataclass(frozen=True)
class CacheContent:
    """What one row keeps.

    Args:
        hidden_states: layers 0…L.
        attentions: layers 1…L, whose attention inputs are kept.
        inputs: which of "queries", "keys" and "values". Maps are made of queries and keys; relations (MiniLMv2) may be of all three.
        logits: keep them.
        top_k: keep only the k largest logits of each distribution, and the mass of the rest; None keeps all.
        dtype: "float32", "bfloat16", "float16" or "int8" (with one scale for each vector), of everything above.

    Raises:
        ValueError: a dtype or an input that is not known, a k below 1.
    """

    hidden_states: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ("queries", "keys")
    logits: bool = True
    top_k: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype={self.dtype!r} is not known; a cache stores {', '.join(PRECISIONS)}.")
        if not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"inputs={self.inputs!r}: a cache keeps {', '.join(INPUTS)} of an attention layer.")
        if self.top_k is not None and (self.top_k < 1 or not self.logits):
            raise ValueError(
                f"top_k={self.top_k!r} with logits={self.logits}: keep at least the largest logit, or leave top_k out (None)."
            )
        for name in ("hidden_states", "attentions"):  # one spelling of one content, because the manifest compares it
            object.__setattr__(self, name, tuple(sorted({int(layer) for layer in getattr(self, name)})))
        object.__setattr__(self, "inputs", tuple(name for name in INPUTS if name in self.inputs))

    @classmethod
    def for_objective(cls, objective: Objective, top_k: int | None = None, dtype: str = "bfloat16") -> "CacheContent":
        """What the objective may ever ask of its teacher: every term it has, also at weight 0, every layer a random map may draw."""
        hidden, attentions = _teacher_layers(objective, "features"), _teacher_layers(objective, "attention")
        logits = objective.outputs is not None
        return cls(hidden, attentions, _inputs(objective) if attentions else ("queries", "keys"), logits, top_k, dtype)

    def missing(self, objective: Objective) -> list[str]:
        """What the objective asks of its teacher at the weights and layer maps of this moment, and this content has not."""
        needs = objective.needs("teacher")
        found = [
            f"the {what} of teacher layer {layer} ({term} term)"
            for what, term, asked, kept in (
                ("hidden state", "features", needs.hidden_states, self.hidden_states),
                ("attention", "attention", needs.attentions, self.attentions),
            )
            for layer in sorted(asked - set(kept))
        ]
        if needs.attentions:
            found += [f"the {name} of its attention layers" for name in _inputs(objective) if name not in self.inputs]
        if needs.logits and not self.logits:
            found.append("the logits (outputs term)")
        return found


def _inputs(objective: Objective) -> tuple[str, ...]:
    return objective.attention.relations if objective.attention.loss == "relations" else ("queries", "keys")


def _teacher_layers(objective: Objective, name: str) -> tuple[int, ...]:
    if getattr(objective, name) is None:
        return ()
    layer_map = objective.map_of(name)
    pairs = layer_map.possible_pairs() if layer_map.is_random else objective.pairs(name)
    return tuple({teacher for _, teacher in pairs})
