"""What a cache keeps of a teacher, and whether that is enough for an objective."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fakit.losses.logits import ANY_VOCABULARIES, check_temperature
from fakit.objective.needs import LAYERS, MLP, Needs
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.objective.schedules import Schedule
from fakit.objective.term import Term
from fakit.tracing.mlp import PLACES
from fakit.training.teacher_cache.packing import PRECISIONS

INPUTS = ("queries", "keys", "values")
TOKENS = ("all", "labeled")
# What came later and stands in a manifest only where it is not as it was before, so that older caches stay.
_LATER = {**dict.fromkeys(("attention_outputs", *MLP), ()), "temperatures": (1.0,), "tokens": "all"}


@dataclass(frozen=True)
class CacheContent:
    """What one row keeps.

    Args:
        hidden_states: layers 0…L.
        attentions: layers 1…L, whose attention inputs are kept.
        inputs: which of "queries", "keys" and "values". Maps are made of queries and keys; relations (MiniLMv2) may be
            of all three.
        logits: keep them.
        top_k: keep only the k largest logits of each distribution, and the mass of the rest, which serves some output
            losses (`fakit.losses.top_k`); None keeps all.
        dtype: "float32", "bfloat16", "float16" or "int8" (with one scale for each vector), of everything here.
        attention_outputs: layers 1…L, of which is kept what their attention adds to the hidden states.
        mlp_outputs, mlp_ups, mlp_gates: likewise of their MLP.
        temperatures: with `top_k`, those at which the mass of the rest is kept.
        tokens: "labeled" keeps the logits of a causal model only at the tokens that an output term compares: those
            whose next token has a label, and all of a text without one. "all" keeps them everywhere.

    Raises:
        ValueError: a dtype, an input or tokens that are not known, a k below 1, a temperature that is none.
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
    temperatures: tuple[float, ...] = (1.0,)
    tokens: str = "all"

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
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens={self.tokens!r} is not known; logits are kept at {' or '.join(TOKENS)} tokens.")
        for temperature in self.temperatures or (None,):
            check_temperature("the rest of top_k", temperature)
        object.__setattr__(self, "temperatures", tuple(sorted({float(tau) for tau in self.temperatures})))
        for name in LAYERS:  # one spelling of one content, because the manifest compares it
            object.__setattr__(self, name, tuple(sorted({int(layer) for layer in getattr(self, name)})))
        object.__setattr__(self, "inputs", tuple(name for name in INPUTS if name in self.inputs))

    @classmethod
    def for_objective(
        cls, objective: Objective, top_k: int | None = None, dtype: str = "bfloat16", tokens: str = "all"
    ) -> "CacheContent":
        """What the objective may ever ask of its teacher: every term it has, also at weight 0,
        every layer a random map may draw; with `top_k`, at the temperatures of its output terms.
        """
        needs = Needs()
        for name, term in objective.terms.items():
            needs = needs | Needs.of(term.cached(), f"the {name} term's cached()")
        taus = [term.written("temperature") for term in objective.of_kind(Outputs).values()]
        fixed = tuple(float(tau) for tau in taus if not isinstance(tau, Schedule))
        return cls.for_needs(needs, top_k, dtype, fixed if top_k is not None else (), tokens)

    @classmethod
    def for_needs(
        cls,
        needs: Needs,
        top_k: int | None = None,
        dtype: str = "bfloat16",
        temperatures: tuple[float, ...] = (),
        tokens: str = "all",
    ) -> "CacheContent":
        """What an objective asks of its teacher at one moment (`objective.needs("teacher")`)."""
        if needs.lens:
            raise ValueError(
                "a lens reads the teacher's hidden states by its own norm and head, which a cache does not hold; "
                "distil from the live teacher, or leave the Lens term out."
            )
        layers = {name: tuple(getattr(needs, name)) for name in LAYERS}
        how = {"logits": needs.logits, "top_k": top_k, "dtype": dtype, "tokens": tokens if needs.logits else "all"}
        return cls(**layers, inputs=tuple(needs.inputs), **how, temperatures=temperatures or (1.0,))

    def asked(self) -> dict[str, Any]:
        """What to ask of `capture`, by keyword."""
        return {name: getattr(self, name) for name in (*LAYERS, "logits")}

    def written(self) -> dict[str, Any]:
        """As a manifest has it; what came later is left out where it is as before, so that older caches stay."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value != _LATER[name]}

    @property
    def precision(self) -> str:
        """In words, for the record of a run."""
        return self.dtype if self.top_k is None else f"{self.dtype}, top {self.top_k}"

    def serves(self, asked: "CacheContent") -> bool:
        """True where this is what is asked, or the same with the logits of more tokens."""
        return self in (asked, replace(asked, tokens="all"))

    def missing(self, objective: Objective, classes: int | None = None) -> list[str]:
        """What the objective asks of its teacher at the weights and layer maps of this moment, or once a schedule lets
        a weight rise, and this content has not.

        Args:
            classes: of the teacher's logits; None where it has none, or they are not known.
        """
        found = []
        for name, term in objective.terms.items():
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
            if needs.logits:
                found += [f"{what} ({name} term)" for what in self.missing_logits(term, classes)]
        return found

    def missing_logits(self, term: Term, classes: int | None) -> Iterator[str]:
        """What it has not of the logits that a term asks for."""
        if not self.logits:
            yield "the logits"
            return
        outputs = isinstance(term, Outputs)
        if self.tokens != "all" and (not outputs or term.loss in ANY_VOCABULARIES):
            yield "the logits of all tokens, beside those whose next token has a label"
        if self.top_k is None or self.top_k == classes:
            return
        beyond = f"the logits beyond the {self.top_k} largest of {classes}"
        if not outputs:
            yield beyond
        elif instead := term.whole_logits(classes):
            yield f"{beyond}: {instead}"
        elif term.temperature not in self.temperatures:
            yield (
                f"the mass of the rest at temperature {term.temperature}, beside the {self.top_k} largest: it is known "
                f"at {', '.join(map(str, self.temperatures))}"
            )


def labels_suffice(objective: Objective) -> bool:
    """True where nothing but output terms that compare token by token looks at the teacher's logits: those at labels
    are all that they ask of a causal model.
    """
    looking = [term for name, term in objective.terms.items() if objective.needs_of(name, "teacher").logits]
    return all(isinstance(term, Outputs) and term.loss not in ANY_VOCABULARIES for term in looking)
