"""Outputs and task in chunks of tokens: head, losses and gradient in one pass over the last hidden states,
without all of the logits.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.logits import ANY_VOCABULARIES
from fakit.objective.outputs import Outputs
from fakit.objective.positions import aligned, predicting
from fakit.objective.task import Task
from fakit.objective.term import Term
from fakit.tracing.trace import Trace


def compare_over_heads(
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    student: Trace,
    teacher: Trace | None,
    labels: Tensor | None,
    shares: Mapping[str, Tensor],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Those of the terms that need no logits in full, where the traces have heads: their weighted sum ()
    and each of them.

    The first output term that compares token by token and the task have one pass together; every other output term has
    its own.
    """
    if student.head is None:
        return None, {}
    outputs = {}
    rows = {name for name, term in terms.items() if isinstance(term, Outputs) and by_rows(term, student, teacher)}
    if teacher is not None and teacher.head is not None:
        outputs = {
            name: term
            for name, term in terms.items()
            if isinstance(term, Outputs) and term.in_chunks and name not in rows
        }
    task = next((name for name, term in terms.items() if isinstance(term, Task)), None)
    if any(isinstance(t, Outputs) and n not in outputs and n not in rows for n, t in terms.items()):
        task = None  # logits are made in full anyway
    total, found = None, {}
    with_task = next((name for name, term in outputs.items() if _in_place(term)), None)
    for name in outputs if with_task is not None else [None, *outputs]:
        beside = task if name == with_task else None
        if name is None and beside is None:
            continue
        part, values = _pass(terms, weights, name, beside, student, teacher, labels, shares)
        total = part if total is None else total + part
        found |= values
    return total, found


def _pass(terms, weights, name: str | None, task: str | None, student, teacher, labels, shares):
    settings = terms[name] if name is not None else Outputs()  # of a term that is not there nothing is used
    ours = student.head
    mask, theirs = None, ours.detach()  # not looked at by the task alone
    if name is not None and not _in_place(settings):
        how = settings.alignment(teacher)
        *hidden, mask = aligned(student, teacher, labels, ours.hidden, teacher.head.hidden, how)
        ours, theirs = (replace(h, hidden=x) for h, x in zip((ours, teacher.head), hidden, strict=True))
        labels = None
    else:
        if name is not None:
            mask, theirs = predicting(student, teacher, labels, ours.hidden), teacher.head
        labels = labels if task is not None or settings.needs_labels else None
        if student.causal:
            ours, theirs = (replace(head, hidden=head.hidden[:, :-1]) for head in (ours, theirs))
            labels = None if labels is None else labels[:, 1:]
    total, outputs, task_value = fused_outputs(
        ours,
        theirs,
        mask,
        divergence=settings.loss,
        parameters=settings.parameters,
        temperature=settings.tau,
        weights=(0.0 if name is None else weights[name], 0.0 if task is None else weights[task]),
        labels=labels,
        vocab_size=settings.vocab_size,
        shares=(shares.get(name), shares.get(task)),
    )
    return total, {n: value for n, value in ((name, outputs), (task, task_value)) if value is not None}


def by_rows(term: Term, student: Trace, teacher: Trace | None) -> bool:
    """Whether the term makes the student's logits itself, of its head and at the positions that it compares."""
    return isinstance(term, Outputs) and teacher is not None and student.head is not None and term.by_rows(teacher)


def _in_place(term: Outputs) -> bool:
    """Whether it compares the two sides token by token, as they are."""
    return term.loss not in ANY_VOCABULARIES


def with_logits(trace: Trace) -> Trace:
    """A trace whose logits are wanted in full after all, because the other side has no head to go by."""
    if trace.head is None or trace.logits is not None:
        return trace
    return replace(trace, logits=trace.head.logits())
