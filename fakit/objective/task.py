"""The task's own loss, beside what is learned from the teacher (arXiv 2412.19449)."""

from dataclasses import dataclass

from torch import Tensor

from fakit.losses.task import task_loss
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.schedules import Schedule
from fakit.objective.term import Term
from fakit.tracing.trace import Trace


@dataclass(init=False)
class Task(Term):
    """The task's own loss on the labels: cross-entropy (labels of -100 are left out),
    or mean squared error for one regression output.

    Args:
        weight: δ.
    """

    needs_labels = True

    weight: float | Schedule = 1.0

    def __init__(self, weight: float | Schedule = 1.0):
        self.weight = weight
        self._made = True

    def needs(self, side: str) -> Needs:
        return Needs(logits=True, in_chunks=True) if side == "student" else Needs()

    def count(self, batch: CountedBatch) -> Tensor:
        labels = batch.labels
        assert labels is not None, "without labels the term is off"
        return ((labels != -100) & ~labels.isnan()).sum()

    def compare(self, student: Trace, teacher: Trace | None, labels: Tensor) -> Tensor:
        if student.logits is None:
            raise ValueError(
                "the task's loss needs logits, and the student's trace has none; capture(..., logits=True)."
            )
        return task_loss(student.logits, labels, student.causal, student.problem_type)
