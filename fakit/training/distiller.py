"""What `DistillationTrainer` trains: student, projections and the way from a batch to a loss, in one module."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.losses.task import task_loss
from fakit.models.blocks import find_blocks
from fakit.models.head_kinds import problem_type
from fakit.models.kinds import is_causal_lm
from fakit.objective.breakdown import Breakdown
from fakit.objective.needs import Needs
from fakit.objective.objective import Objective
from fakit.tracing.capture import capture
from fakit.tracing.trace import Trace


class Distiller(nn.Module):
    """Student, projections and the way from a batch to a loss, in one trainable module.

    The teacher is held but not registered: it is not trained, saved, counted or wrapped. All of the work happens in
    `forward`, so whatever wraps the module (DDP, autocast, compile) sees it.
    """

    # The objective's total is a mean over its own batch: the Trainer has to divide it by the accumulation steps. It
    # would think otherwise, because `forward` takes **inputs.
    accepts_loss_kwargs = False

    def __init__(self, teacher: PreTrainedModel | None, student: PreTrainedModel, objective: Objective):
        super().__init__()
        self.student = student
        self.objective = objective
        is_causal_lm(student)  # asked now: later it may be sharded, wrapped or compiled
        self._teacher = (teacher,)  # a tuple hides it from nn.Module's bookkeeping
        self.breakdown: Breakdown | None = None  # of the last training step, detached

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen teacher; None where a cache stands for it."""
        return self._teacher[0]

    @property
    def config(self):
        """The student's, for whatever asks the model in training for its configuration."""
        return self.student.config

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute the student's activations in the backward pass (gradient checkpointing)."""
        refuse_reentrant(activation_checkpointing_kwargs)
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep the student's activations again."""
        self.student.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """True while the student recomputes its activations."""
        return self.student.is_activation_checkpointing

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the student's blocks: FSDP's TRANSFORMER_BASED_WRAP shards each block by itself."""
        return sorted({type(block).__name__ for block in find_blocks(self.student)})

    def tie_weights(self) -> None:
        """Tie the student's heads and embeddings again, after FSDP has put its parameters anew: those that were tied,
        not those of a configuration that ties what the weights do not (T5 v1.1).
        """
        self.student.tie_weights(recompute_mapping=False)

    def forward(
        self,
        labels: Tensor | None = None,
        shares: dict[str, Tensor] | None = None,
        theirs: Trace | None = None,
        written: bool = False,
        teacher_batch: dict[str, Tensor] | None = None,
        **inputs,
    ) -> dict[str, Tensor]:
        """Training: the objective's loss (). Eval: the student's logits and, where there are labels,
        the task's loss (), without teacher.

        `shares`: what this batch counts for in the optimizer step, by term (see `fakit.training.token_counts`); None
        where it is all of the step. `theirs`: the teacher's trace, where it comes from a cache. `written`: the student
        wrote the labeled tokens itself (`fakit.training.on_policy`); they are no answers. `teacher_batch`: the rows in
        the teacher's own tokens (`fakit.tasks.two_tokenizers`).
        """
        if not self.training:
            trace = capture(self.student, inputs | {"labels": labels})
            if labels is None:
                return {"logits": trace.logits}
            return {"loss": self._task_loss(trace.logits, trace.own_labels(labels)), "logits": trace.logits}
        asked = inputs | {"labels": labels}  # an encoder-decoder makes its decoder's inputs of them
        if theirs is None and self.objective.needs_teacher():
            if (
                self.teacher.training
            ):  # whoever looked at it in between; with dropout it would say something else each time
                self.teacher.eval()
            with torch.no_grad():
                theirs = teacher_traced(self.teacher, asked, teacher_batch, self.objective.needs("teacher"))
        ours = traced(self.student, asked, self.objective.needs("student", labels is not None and not written))
        breakdown = self.objective(ours, theirs, labels, shares, written)
        self.breakdown = breakdown.detach()
        return {"loss": breakdown.total}

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return task_loss(logits, labels, is_causal_lm(self.student), problem_type(self.student.config))


def traced(model: PreTrainedModel, inputs: dict, needs: Needs) -> Trace:
    """`capture` of what an objective needs."""
    return capture(model, inputs, **needs.asked())


def teacher_traced(teacher: PreTrainedModel, inputs: dict, own: dict[str, Tensor] | None, needs: Needs) -> Trace:
    """`capture` of what an objective needs of the teacher, on the batch, or on the same rows in its `own` tokens."""
    if own is None:
        return traced(teacher, inputs, needs)
    same = {name.removeprefix("same_"): x for name, x in own.items() if name.startswith("same_")}
    given = {name: own[name] for name in ("input_ids", "attention_mask")}
    return replace(traced(teacher, given, needs), same=same, shared_tokens=own.get("shared_tokens"))


def refuse_reentrant(activation_checkpointing_kwargs: dict | None) -> None:
    """Raise ValueError for checkpointing that runs blocks without graph."""
    if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "gradient checkpointing with use_reentrant=True runs the student's blocks without graph, so feature and "
            "attention terms would train nothing; leave use_reentrant out (False)."
        )
