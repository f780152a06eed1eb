"""What a cache keeps of a teacher, and whether that is enough for an objective."""

from dataclasses import asdict, dataclass
from typing import Any

from fakit.objective.needs import LAYERS, MLP, Needs
from fakit.objective.objective import Objective
from fakit.tracing.mlp import PLACES
from fakit.training.teacher_cache.packing import PRECISIONS

INPUTS = ("queries", "keys", "values")


@dataclass(frozen=True)
class CacheContent:
    """What one row keeps.

    Args:
        hidden_states: layers 0…L.
        attentions: layers 1…L, whose attention inputs are kept.
        inputs: which of "queries", "keys" and "values". Maps are made of queries and keys; relations (MiniLMv2) may be
            of all three.
        logits: keep them.
        top_k: keep only the k largest logits of each distribution, and the mass of the rest; None keeps all.
        dtype: "float32", "bfloat16", "float16" or "int8" (with one scale for each vector), of everything here.
        attention_outputs: layers 1…L, of which is kept what their attention adds to the hidden states.
        mlp_outputs, mlp_ups, mlp_gates: likewise of their MLP.

    Raises:
        ValueError: a dtype or an input that is not known, a k below 1.
    """

    hidden_states: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ("queries", "keys")
    logits: bool = True
    top_k: int | None = None
    dtype: str = "bfloat16"
    attention_outputs: tuple[int, ...] = ()
    mlp_outputs: tuple[int, ...] = ()
    mlp_ups: tuple[int, ...] = ()
    mlp_gates: tuple[int, ...] = ()

    def __post_init__(self):
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype={self.dtype!r} is not known; a cache stores {', '.join(PRECISIONS)}.")
        if not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"inputs={self.inputs!r}: a cache keeps {', '.join(INPUTS)} of an attention layer.")
        if self.top_k is not None and (self.top_k < 1 or not self.logits):
            raise ValueError(
                f"top_k={self.top_k!r} with logits={self.logits}: keep at least the largest logit, or leave top_k out "
                "(None)."
            )
        for name in LAYERS:  # one spelling of one content, because the manifest compares it
            object.__setattr__(self, name, tuple(sorted({int(layer) for layer in getattr(self, name)})))
        object.__setattr__(self, "inputs", tuple(name for name in INPUTS if name in self.inputs))

    @classmethod
    def for_objective(cls, objective: Objective, top_k: int | None = None, dtype: str = "bfloat16") -> "CacheContent":
        """What the objective may ever ask of its teacher: every term it has, also at weight 0,
        every layer a random map may draw.
        """
        needs = Needs()
        for name, term in objective.terms.items():
            needs = needs | Needs.of(term.cached(), f"the {name} term's cached()")
        return cls.for_needs(needs, top_k, dtype)

    @classmethod
    def for_needs(cls, needs: Needs, top_k: int | None = None, dtype: str = "bfloat16") -> "CacheContent":
        """What an objective asks of its teacher at one moment (`objective.needs("teacher")`)."""
        if needs.lens:
            raise ValueError(
                "a lens reads the teacher's hidden states by its own norm and head, which a cache does not hold; "
                "distil from the live teacher, or leave the Lens term out."
            )
        layers = {name: tuple(getattr(needs, name)) for name in LAYERS}
        return cls(**layers, inputs=tuple(needs.inputs), logits=needs.logits, top_k=top_k, dtype=dtype)

    def asked(self) -> dict[str, Any]:
        """What to ask of `capture`, by keyword."""
        return {name: getattr(self, name) for name in (*LAYERS, "logits")}

    def written(self) -> dict[str, Any]:
        """As a manifest has it; what came later is left out where it is not there, so that older caches stay."""
        return {name: value for name, value in asdict(self).items() if name not in ("attention_outputs", *MLP) or value}

    def missing(self, objective: Objective) -> list[str]:
        """What the objective asks of its teacher at the weights and layer maps of this moment, or once a schedule lets
        a weight rise, and this content has not.
        """
        found = []
        for name in objective.terms:
            needs = objective.needs_of(name, "teacher") if objective.ever_active(name) else Needs()
            for what, asked, kept in (
                ("hidden state", needs.hidden_states, self.hidden_states),
                ("attention", needs.attentions, self.attentions),
                ("attention output", needs.attention_outputs, self.attention_outputs),
                *((PLACES[name], getattr(needs, name), getattr(self, name)) for name in MLP),
            ):
                found += [f"the {what} of teacher layer {layer} ({name} term)" for layer in sorted(asked - set(kept))]
            if needs.attentions:
                found += [
                    f"the {inputs} of its attention layers"
                    for inputs in INPUTS
                    if inputs in needs.inputs - set(self.inputs)
                ]
            if needs.lens:
                found.append(f"the teacher's own norm and head, which no cache holds ({name} term)")
            if needs.logits and not self.logits:
                found.append(f"the logits ({name} term)")
        return found
