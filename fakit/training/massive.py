"""What of a features term is due to massive activations: looked at before the first step."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fakit.evaluation.batches import eval_mode
from fakit.models.massive import are_massive, in_words, massive_activations
from fakit.objective.features import Features
from fakit.objective.objective import Objective
from fakit.tracing.capture import capture
from fakit.tracing.trace import Trace

logger = logging.getLogger(__name__)

MOST = 0.5  # of a term's value


def share_of_massive(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
) -> dict[str, float]:
    """Of each features term over whole blocks, the share of its value that goes when the teacher's massive activations,
    and the student's numbers in their places, are set to 0. Terms that standardize or project are left out, and so is
    everything where there are none.

    Args:
        batch: some rows, as both models are given them, with or without labels.
    """
    return {name: share for name, (share, _) in _looked_at(objective, student, teacher, batch).items()}


def warn_of_massive(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
) -> None:
    """Log a warning for each features term that massive activations make up most of."""
    for name, (share, where) in _looked_at(objective, student, teacher, batch).items():
        if share > MOST:
            logger.warning(
                "%s: %.0f %% of its value at the start is due to the teacher's massive activations (%s). The student "
                "would learn these few numbers first: take loss: cosine, tokens: later, or "
                "standardize: dimension with standardize_batches: 8.",
                name,
                100 * share,
                where,
            )


def _looked_at(objective, student, teacher, batch) -> dict[str, tuple[float, str]]:
    widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
    terms = {
        name: term
        for name, term in objective.of_kind(Features).items()
        if term.at == "block" and term.standardize is None and not term.projects(*widths) and objective.pairs(name)
    }
    if not terms:
        return {}
    pairs = {name: objective.pairs(name) for name in terms}
    sides = []
    for model, place in ((student, 0), (teacher, 1)):
        layers = sorted({pair[place] for of_term in pairs.values() for pair in of_term})
        with torch.no_grad(), eval_mode(model):
            sides.append(capture(model, batch, hidden_states=layers, logits=False))
    ours, theirs = sides
    ours = replace(ours, labels=batch.get("labels"))
    masks = {layer: theirs.layer_mask(layer) for layer in theirs.hidden_states}  # a decoder's are of other tokens
    massive = [
        one
        for layer, x in theirs.hidden_states.items()
        if (mask := masks[layer]) is not None
        for one in massive_activations({layer: x}, mask)
    ]
    if not massive:
        return {}
    found = {}
    for name, term in terms.items():
        whole = rest = 0.0
        for pair in pairs[name]:
            with torch.no_grad():
                whole += term.compare_pair(ours, theirs, pair).item()
                rest += term.compare_pair(*_without(ours, theirs, pair, masks[pair[1]]), pair).item()
        layers = {pair[1] for pair in pairs[name]}
        where = in_words([one for one in massive if one.layer in layers])
        found[name] = (max(0.0, 1 - rest / whole) if whole > 0 else 0.0), where
    return found


def _without(ours: Trace, theirs: Trace, pair, mask: Tensor | None) -> tuple[Trace, Trace]:
    """Both traces with 0 at a pair where the teacher's states are massive."""
    if mask is None:
        return ours, theirs
    student, teacher = ours.hidden_states[pair[0]], theirs.hidden_states[pair[1]]
    massive = are_massive(teacher, teacher[mask].abs().float().median().item()) & mask.unsqueeze(-1)
    if student.shape == teacher.shape:
        student = student.masked_fill(massive.to(student.device), 0.0)
    teacher = teacher.masked_fill(massive, 0.0)
    return (
        replace(ours, hidden_states={**ours.hidden_states, pair[0]: student}),
        replace(theirs, hidden_states={**theirs.hidden_states, pair[1]: teacher}),
    )
