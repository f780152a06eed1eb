"""Whose numbers a term that is NaN or infinite comes from."""

from torch import Tensor

from fakit.layer_maps import Pair
from fakit.objective.needs import Needs
from fakit.objective.term import Term
from fakit.tracing.trace import BY_TOKEN, Trace


def whose_numbers(term: Term, pairs: list[Pair], student: Trace | None, teacher: Trace | None) -> str:
    """Which side's numbers are not finite, where the term looks; "" where both are finite, or not known (None)."""
    for index, (side, trace) in ((1, ("teacher", teacher)), (0, ("student", student))):
        needs = Needs.of(term.needs(side), type(term).__name__)
        if trace is None or not needs:
            continue
        layers = {pair[index] for pair in pairs}
        found = _not_finite(trace, needs, layers or needs.layers)
        if found:
            fix = (
                " Look at its weights: damaged, or loaded in float16 where bfloat16 or float32 would hold them." * index
            )
            return f"the {side}'s ({trace.name}) {found} not finite.{fix}"
    return ""


def _not_finite(trace: Trace, needs: Needs, layers: set[int] | frozenset[int]) -> str | None:
    for name in BY_TOKEN:
        for layer in sorted(layers & getattr(needs, name)):
            if _wrong(getattr(trace, name).get(layer), trace.layer_mask(layer)):
                return f"{name.replace('_', ' ')} of layer {layer} are"
    for layer in sorted(layers & needs.attentions):
        inputs = trace.attention.get(layer)
        given = [trace.maps.get(layer)] if inputs is None else [inputs.query, inputs.key, inputs.value]
        if any(_wrong(x) for x in given):
            return f"attention inputs of layer {layer} are"
    if needs.logits:
        head = trace.head
        given = [trace.logits] if head is None else [head.hidden, head.weight, head.bias]
        mask = trace.logits_mask if given[0] is not None and given[0].dim() == 3 else None
        # a logit of -inf takes its class out of the vocabulary
        if any(_wrong(x, mask if number == 0 else None, low=False) for number, x in enumerate(given)):
            return "logits are"
    return None


def _wrong(x: Tensor | None, mask: Tensor | None = None, low: bool = True) -> bool:
    """NaN or infinite where it counts; `low`: -inf, too."""
    if x is None:
        return False
    wrong = ~x.isfinite() if low else x.isnan() | (x == float("inf"))
    if mask is not None and wrong.shape[:2] == mask.shape:
        wrong = wrong & mask.unsqueeze(-1)
    return bool(wrong.any())
