"""All terms of two traces before weighting: over the heads where that is possible, each by itself elsewhere."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fakit.layer_maps import Pair
from fakit.objective.needs import Needs
from fakit.objective.over_heads import by_rows, compare_over_heads, with_logits
from fakit.objective.term import Term
from fakit.tracing.trace import Trace


@dataclass
class Comparison:
    """The terms of two traces, before weighting.

    Attributes:
        values: {name: scalar with graph}.
        per_layer: {name: {(student layer, teacher layer): detached scalar}} of the terms that have pairs.
        at_once: those that went over the heads, by name.
        together: the weighted sum () of those, whose gradient is there already; None where there are none.
    """

    values: dict[str, Tensor]
    per_layer: dict[str, dict[Pair, Tensor]]
    at_once: dict[str, Tensor]
    together: Tensor | None


def compare(
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    student: Trace,
    teacher: Trace | None,
    labels: Tensor | None,
    scales: Mapping[str, Tensor],
) -> Comparison:
    """Every one of the terms; a term without a pair to compare is left out.

    Args:
        terms: the active ones.
        weights: of these; they, and `scales`, factors () on them, are in the gradient of what goes over the heads.

    Raises:
        ValueError: a term whose loss is no scalar.
    """
    student = replace(student, labels=labels)
    together, at_once = compare_over_heads(terms, weights, student, teacher, labels, scales)
    heads = {name for name, term in terms.items() if name not in at_once and by_rows(term, student, teacher)}
    whole = (student, teacher)
    if _want_logits(term for name, term in terms.items() if name not in at_once and name not in heads):
        whole = with_logits(student), None if teacher is None else with_logits(teacher)
    values: dict[str, Tensor] = {}
    per_layer: dict[str, dict[Pair, Tensor]] = {}
    for name, term in terms.items():
        if name in at_once:
            values[name] = at_once[name]
            continue
        found = term.compare(*((student, teacher) if name in heads else whole), labels)
        by_pair = found if isinstance(found, Mapping) else {}
        if by_pair:
            pair_shares = term.shares() or dict.fromkeys(by_pair, 1 / len(by_pair))
            found = sum(pair_shares[pair] * _scalar(name, term, value) for pair, value in by_pair.items())
            per_layer[name] = {pair: value.detach() for pair, value in by_pair.items()}
        elif isinstance(found, Mapping):  # a map without pairs
            continue
        values[name] = _scalar(name, term, found)
    return Comparison(values, per_layer, at_once, together)


def _want_logits(terms: Iterable[Term]) -> bool:
    return any(Needs.of(t.needs(side), type(t).__name__).logits for t in terms for side in ("student", "teacher"))


def _scalar(name: str, term: Term, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ():
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the {name} term ({type(term).__name__}.compare) gave {found}; a loss is a scalar tensor (), or a "
            "dictionary of them by layer pair."
        )
    return value
