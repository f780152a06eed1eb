"""How hard each term of the objective pulls on the student, where, and against which other term.

A weighted sum of losses has the weighted sum of their gradients, so that the inner products of the terms' raw gradients
say all there is to say under any weights: with G[i, j] = ⟨∇L_i, ∇L_j⟩,

    ‖∇ Σ w_i L_i‖² = wᵀ G w        cos(i, j) = G[i, j] / √(G[i, i] G[j, j])

For k terms that is a k × k matrix a layer. It is what is kept here;
the gradients themselves live only while it is made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fakit.models.blocks import find_blocks
from fakit.objective.breakdown import Breakdown, Pair, total
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.tracing.capture import capture

Part = int | str  # a layer number (0 = embeddings), or "head": what follows the last block
HEAD = "head"
ALL = "all"


@dataclass(frozen=True)
class TermGradients:
    """Losses before weighting, and the inner products of their gradients by part of the student.

    Attributes:
        losses: {term: its value before weighting}, the mean over the batches.
        per_layer: {term: {(student layer, teacher layer): value}} for the terms that go over layers.
        parts: the parts of the student that have trainable parameters: layer numbers (0 = embeddings), then "head".
        gram: (P, k, k) float64: ⟨∇L_i, ∇L_j⟩ over the parameters of each part.
        temperature: τ of the output term; None without one.
    """

    losses: dict[str, float]
    per_layer: dict[str, dict[Pair, float]]
    parts: tuple[Part, ...]
    gram: Tensor
    temperature: float | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms, in the order of `gram`."""
        return tuple(self.losses)

    def inner(self, part: Part = ALL) -> Tensor:
        """⟨∇L_i, ∇L_j⟩ over the whole student, or over one part. (k, k)"""
        if part == ALL:
            return self.gram.sum(0)
        if part not in self.parts:
            raise ValueError(f"no part {part!r} with trainable parameters in this student; parts: 'all', {self.parts}.")
        return self.gram[self.parts.index(part)]

    def norms(self, weights: Mapping[str, float] | None = None, part: Part = ALL) -> dict[str, float]:
        """‖w_i ∇L_i‖ of each term; w = 1 where no weights are given."""
        raw = self.inner(part).diagonal().clamp(min=0).sqrt()  # (k,)
        return dict(zip(self.terms, (raw * self._vector(weights)).tolist(), strict=True))

    def cosines(self, part: Part = ALL) -> Tensor:
        """cos(∇L_i, ∇L_j), whatever the weights; NaN where a term has no gradient in that part. (k, k)"""
        gram = self.inner(part)
        length = gram.diagonal().clamp(min=0).sqrt()  # (k,)
        length = torch.where(length > 0, length, torch.nan)
        return (gram / (length[:, None] * length)).clamp(-1, 1)

    def cosine(self, term: str, other: str, part: Part = ALL) -> float:
        """cos of the gradients of two terms, by name; NaN where one has no gradient in that part.

        Raises:
            ValueError: a term that was not measured, or a part without trainable parameters.
        """
        if missing := [name for name in (term, other) if name not in self.terms]:
            raise ValueError(f"no gradient of {', '.join(missing)} was measured; measured were {self.terms}.")
        return self.cosines(part)[self.terms.index(term), self.terms.index(other)].item()

    def total_norm(self, weights: Mapping[str, float] | None = None, part: Part = ALL) -> float:
        """‖∇ Σ w_i L_i‖."""
        w = self._vector(weights)
        return (w @ self.inner(part) @ w).clamp(min=0).sqrt().item()

    def total(self, weights: Mapping[str, float] | None = None) -> float:
        """Σ w_i L_i."""
        return sum(w * loss for w, loss in zip(self._vector(weights).tolist(), self.losses.values(), strict=True))

    def _vector(self, weights: Mapping[str, float] | None) -> Tensor:
        if weights is None:
            return torch.ones(len(self.losses), dtype=torch.float64)
        if missing := [name for name in self.terms if name not in weights]:
            raise ValueError(
                f"no weight for {missing}; weights are given for {list(weights)}, gradients of {self.terms}."
            )
        return torch.tensor([float(weights[name]) for name in self.terms], dtype=torch.float64)

    def __str__(self) -> str:
        norms = self.norms()
        return ", ".join(f"{name} {loss:.4g} (gradient {norms[name]:.4g})" for name, loss in self.losses.items())

    def _repr_markdown_(self) -> str:
        by_part = [self.norms(part=part) for part in self.parts]
        lines = [
            f"| term | loss | gradient | {' | '.join(map(part_name, self.parts))} |",
            "|---|---|---|" + "---|" * len(by_part),
        ]
        for name, norm in self.norms().items():
            cells = " | ".join(f"{norms[name]:.3g}" for norms in by_part)
            lines.append(f"| {name} | {self.losses[name]:.4g} | {norm:.4g} | {cells} |")
        return "\n".join(lines)


def part_name(part: Part) -> str:
    """ "S0", "S1" … for layers, and the other parts as they are called."""
    return part if isinstance(part, str) else f"S{part}"


def term_gradients(
    objective: Objective,
    teacher: nn.Module | None,
    student: nn.Module,
    batches: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    terms: Sequence[str] | None = None,
) -> TermGradients:
    """The gradient of each term's raw value with respect to the student's trainable parameters, as inner products.

    The weights take no part: a term of weight 0 is measured too. Models stay in the mode they are in; a student in
    training mode has dropout in its numbers. Nothing is written into `.grad`. At its peak this holds the graph of the
    batches and one gradient of the student a term.

    Args:
        objective: its terms, layer map and temperature; its projections take part, but are no part of the student.
        teacher: None where no term looks at one.
        batches: one batch or several, of which the mean counts; "labels" (B,) or (B, T) are for the task term.
        terms: which to measure; by default all of the objective's, the task only where there are labels.

    Raises:
        ValueError: a term that the objective does not have, no batch, a student without trainable parameters, a loss
            that is NaN (named by term and layer), or what capture and the objective refuse.

    >>> gradients = term_gradients(objective, teacher, student, batch)  # doctest: +SKIP
    >>> gradients.norms(), gradients.cosines(part=3)  # doctest: +SKIP
    """
    (measured,) = _measure(objective, teacher, student, batches, terms, None)
    return measured


def gradients_by_temperature(
    objective: Objective,
    teacher: nn.Module | None,
    student: nn.Module,
    batches: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    temperatures: Sequence[float],
) -> dict[float, TermGradients]:
    """`term_gradients` at several τ of the output term: one pass forward for all, one more backward a temperature.

    Raises:
        ValueError: an objective without output term, a τ that is not above 0, and what `term_gradients` refuses.
    """
    if objective.temperature is None:
        raise ValueError(
            "a temperature is the output term's, and this objective has none; Objective(outputs=Outputs())."
        )
    if learned := [name for name, term in objective.of_kind(Outputs).items() if term.learns_temperature]:
        raise ValueError(
            f"{learned[0]} learns its temperature, so that none can be set: measure an Outputs without reversal, or "
            "term_gradients at the temperature as it is."
        )
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures are above 0, at least one of them; found {list(temperatures)}.")
    measured = _measure(objective, teacher, student, batches, None, list(temperatures))
    return dict(zip(temperatures, measured, strict=True))


def balanced_weights(
    gradients: TermGradients, weights: Mapping[str, float] | None = None, reference: str = "task"
) -> dict[str, float]:
    """Weights under which every term pulls as hard as the reference: w_i = w_ref · ‖∇L_ref‖ / ‖∇L_i‖.

    It is where GradNorm (Chen et al., ICML 2018, arXiv 1711.02257, eq. 1 and 2) settles with its asymmetry α at 0: all
    ‖w_i ∇L_i‖ equal, over all of the student's parameters in place of its last shared layer, and with the reference's
    weight held in place of the sum of weights.

    Args:
        weights: w of this moment; a term of weight 0 is off and stays off. All 1 by default.
        reference: the term whose weight stays; the first one that is on where this one is not there.

    Raises:
        ValueError: no term is on, or one that is on has no gradient, which no weight can mend.
    """
    weights = dict.fromkeys(gradients.terms, 1.0) if weights is None else {n: weights[n] for n in gradients.terms}
    norms = gradients.norms()
    on = [name for name, weight in weights.items() if weight > 0]
    if not on:
        raise ValueError(f"nothing to balance: every weight is 0 ({weights}). Raise one.")
    if flat := [name for name in on if norms[name] == 0]:
        raise ValueError(
            f"{', '.join(flat)} has no gradient at the student (norms {norms}): no weight makes it pull. Set its "
            "weight to 0, or measure on other batches."
        )
    reference = reference if reference in on else on[0]
    pull = weights[reference] * norms[reference]
    return {name: pull / norms[name] if name in on and name != reference else weights[name] for name in weights}


# -- measuring --------------------------------------------------------------------------------------------------------


def _measure(objective, teacher, student, batches, terms, temperatures: list[float] | None) -> list[TermGradients]:
    """One TermGradients a temperature; one for None, at the objective's own."""
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if not batches:
        raise ValueError("gradients are measured on at least one batch; found none.")
    names = _chosen(objective, batches, terms)
    parameters = parameters_by_part(student)
    if not parameters:
        raise ValueError(f"no parameter of {type(student).__name__} is trainable (requires_grad): it has no gradient.")
    own = objective.temperature
    softened = [name for name in names if name in objective.softened]  # depend on τ
    measured = []
    with torch.enable_grad(), objective.buffers_kept(), _set(objective, dict.fromkeys(names, 1.0)):
        traces = [_traces(objective, teacher, student, batch) for batch in batches]
        fixed = _mean([objective(*trace) for trace in traces])
        kept = {name: _gradient(loss, parameters) for name, loss in fixed.terms.items() if name not in softened}
        known: dict[tuple[str, str], Tensor] = {}  # inner products of terms that do not depend on τ
        for tau in [own] if temperatures is None else temperatures:
            losses, gradients = dict(fixed.terms), kept
            if softened:
                if tau != own:
                    with _set(objective, dict.fromkeys(softened, 1.0), tau):
                        losses |= _mean([objective(*trace) for trace in traces]).terms
                gradients = kept | {name: _gradient(losses[name], parameters) for name in softened}
            measured.append(
                TermGradients(
                    {name: loss.item() for name, loss in losses.items()},
                    {name: {pair: v.item() for pair, v in by.items()} for name, by in fixed.per_layer.items()},
                    tuple(parameters),
                    _gram({name: gradients[name] for name in losses}, parameters, known, softened),
                    None if not softened else float(objective.taus[softened[0]]) if temperatures is None else tau,
                )
            )
    return measured


def parameters_by_part(student: nn.Module) -> dict[Part, list[nn.Parameter]]:
    """The student's trainable parameters by layer: 0 = embeddings, i = block i, "head" = what is neither.

    A parameter stands in one part only: a block that serves several layers with the first of them, a head that is tied
    to the embeddings with these.
    """
    blocks = find_blocks(student)
    layer_of: dict[int, Part] = {}
    for number, block in reversed(list(enumerate(blocks, start=1))):
        layer_of |= {id(parameter): number for parameter in block.parameters()}
    transformer: Any = student
    output = transformer.get_output_embeddings() if hasattr(student, "get_output_embeddings") else None
    inputs = transformer.get_input_embeddings() if hasattr(student, "get_input_embeddings") else None
    tied = {id(parameter) for parameter in inputs.parameters()} if inputs is not None else set()
    heads = {id(parameter) for parameter in output.parameters()} - tied if output is not None else set()
    parts: dict[Part, list[nn.Parameter]] = {part: [] for part in (*range(len(blocks) + 1), HEAD)}
    reached = False  # the blocks, in the order in which the model names its parameters
    for name, parameter in student.named_parameters():
        part = layer_of.get(id(parameter))
        reached = reached or part is not None
        if part is None:
            embeds = id(parameter) not in heads and (not reached or "embed" in name)
            part = 0 if embeds else HEAD
        if parameter.requires_grad:
            parts[part].append(parameter)
    return {part: found for part, found in parts.items() if found}


def _chosen(objective: Objective, batches: list[Mapping], terms: Sequence[str] | None) -> list[str]:
    labeled = all(batch.get("labels") is not None for batch in batches)
    has = [name for name, term in objective.terms.items() if labeled or not term.needs_labels]
    if terms is not None and (unknown := [name for name in terms if name not in has]):
        raise ValueError(f"no gradient of {unknown}: this objective has {has}{'' if labeled else ', and no labels'}.")
    names = has if terms is None else list(terms)
    if not names:
        raise ValueError("the task term needs labels, and the batches have none; add batch['labels'] or another term.")
    return names


@contextmanager
def _set(objective: Objective, weights: dict[str, float], temperature: float | None = None) -> Iterator[None]:
    """While open, these weights (others 0), and this τ where one is given; then the objective's own again."""
    before, stepped, balancing = objective.settings, objective.stepped, objective.balancing
    try:
        objective.stepped, objective.balancing = True, None  # what is measured here is the step at hand, term by term
        objective.weights.update({name: weights.get(name, 0.0) for name in before})
        if temperature is not None:
            objective.temperature = temperature
        yield
    finally:
        objective.settings, objective.stepped, objective.balancing = before, stepped, balancing


def _traces(objective: Objective, teacher, student, batch: Mapping) -> tuple:
    """Student trace with graph, teacher trace or None, labels."""
    labels = batch.get("labels")
    device = next(student.parameters()).device
    ours = objective.needs("student", labels=labels is not None)
    # logits whole: over a head the output term and the task have one gradient together
    student_trace = capture(student, batch, **ours.asked(whole=True))
    teacher_trace = None
    if objective.needs_teacher():
        if teacher is None:
            raise ValueError(f"the terms {list(objective.weights)} compare with a teacher, and none was given.")
        theirs = objective.needs("teacher")
        with torch.no_grad():
            teacher_trace = capture(teacher, batch, **theirs.asked(whole=True))
    return student_trace, teacher_trace, None if labels is None else labels.to(device)


def _mean(breakdowns: list[Breakdown]) -> Breakdown:
    """The mean of each term over the batches."""
    for breakdown in breakdowns:
        breakdown.check()
    terms = {name: total([b.terms[name] for b in breakdowns]) / len(breakdowns) for name in breakdowns[0].terms}
    layers = {
        name: {pair: total([b.per_layer[name][pair] for b in breakdowns]) / len(breakdowns) for pair in by}
        for name, by in breakdowns[0].per_layer.items()
    }
    return Breakdown(total(terms.values()), terms, terms, layers)


def _gradient(loss: Tensor, parameters: dict[Part, list[nn.Parameter]]) -> list[Tensor | None]:
    """By parameter; None where the loss does not depend on it."""
    flat = [parameter for part in parameters.values() for parameter in part]
    if not loss.requires_grad:  # a term of layers below the first trainable one
        return [None] * len(flat)
    return list(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))


def _gram(
    gradients: dict[str, list],
    parameters: dict[Part, list],
    known: dict[tuple[str, str], Tensor],
    softened: Sequence[str],
) -> Tensor:
    """Inner products by part, (P, k, k); those of terms without τ alone go into `known`, and are taken from there."""
    gram = torch.zeros(len(parameters), len(gradients), len(gradients), dtype=torch.float64)
    for i, (one, left) in enumerate(gradients.items()):
        for j, (other, right) in enumerate(list(gradients.items())[: i + 1]):
            products = known.get((one, other))
            if products is None:
                products = _inner(left, right, parameters)
                if one not in softened and other not in softened:
                    known[one, other] = products
            gram[:, i, j] = gram[:, j, i] = products
        if not torch.isfinite(gram[:, i, i]).all():
            where = [
                part_name(part) for part, v in zip(parameters, gram[:, i, i], strict=True) if not torch.isfinite(v)
            ]
            raise ValueError(
                f"the gradient of the {one} term is not finite at {', '.join(where)}, while its loss is. Look at "
                "half-precision overflow (use bf16), or at a loss that divides by, or takes the root or the logarithm "
                "of, something that is 0."
            )
    return gram


def _inner(left: list[Tensor | None], right: list[Tensor | None], parameters: dict[Part, list]) -> Tensor:
    """⟨left, right⟩ by part. (P,)"""
    pairs = iter(zip(left, right, strict=True))
    products = torch.zeros(len(parameters), dtype=torch.float64)
    for number, part in enumerate(parameters.values()):
        for _ in part:
            ours, theirs = next(pairs)
            if ours is not None and theirs is not None:
                # .float() of what is float32 copies nothing
                products[number] += torch.dot(ours.flatten().float(), theirs.flatten().float()).item()
    return products
