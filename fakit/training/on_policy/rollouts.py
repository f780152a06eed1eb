"""`Rollouts`: the student's writing in one run, and what is counted of it."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fakit.objective.objective import Objective
from fakit.objective.schedules import Schedule, all_off, at_step
from fakit.objective.term import Term
from fakit.training.on_policy.settings import OnPolicy
from fakit.training.on_policy.writing import prompts_of, write, written_batch

WRITTEN = "written"  # in a batch: True where the student wrote it
Batch = dict[str, Any]


@dataclass
class Tally:
    """What was written in some steps, in this process."""

    steps: int = 0
    written: int = 0  # steps
    rows: int = 0
    tokens: int = 0
    ended: int = 0  # rows, by a token that ends
    seconds: float = 0.0

    def summary(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Of all processes: the share of the steps in which the student wrote, tokens an answer, the share of the
        answers that ended by themselves, and tokens a second of writing; the first alone where it wrote nothing.

        Args:
            gather: puts the processes' tensors one after another along the first dimension.
        """
        own = torch.tensor([[self.rows, self.tokens, self.ended, round(1e6 * self.seconds)]], device=device)
        table = gather(own)  # (processes, 4)
        rows, tokens, ended, microseconds = table.sum(0).tolist()
        found = {"share": self.written / max(1, self.steps)}
        if rows:
            seconds = max(1, microseconds) / 1e6 / len(table)  # they write at the same time
            found |= {"tokens": tokens / rows, "ended": ended / rows, "tokens_per_second": tokens / seconds}
        return found


@dataclass
class Rollouts:
    """The student's writing in one run.

    Attributes:
        since_log, in_all: what was written since the last log, and since the run was begun or resumed.
    """

    on_policy: OnPolicy
    student: PreTrainedModel
    objective: Objective
    ends: tuple[int, ...]
    vocabulary: int  # of the teacher's tokens
    fill: int
    since_log: Tally = field(default_factory=Tally)
    in_all: Tally = field(default_factory=Tally)

    def in_place_of(self, batches: list[Batch], seed: int, step: int, steps: int, process: int) -> list[Batch]:
        """The micro-batches of an optimizer step, as they are or with what the student writes in place of answers.

        Args:
            step: optimizer steps done, `steps` in all.
            process: its number, of those that train.
        """
        if not self.in_all.steps:
            self._check_weights(seed, steps)
        is_on = self.on_policy.in_step(seed, step, steps)
        for tally in (self.since_log, self.in_all):
            tally.steps, tally.written = tally.steps + 1, tally.written + is_on
        if not is_on:
            return batches
        return [self._written(batch, seed_of(seed, step, part, process)) for part, batch in enumerate(batches)]

    def _written(self, batch: Batch, seed: int) -> Batch:
        prompts, began = prompts_of(batch), time.perf_counter()
        answers = write(self.student, prompts, self.on_policy, self.ends, seed, self.vocabulary)
        seconds = time.perf_counter() - began
        for tally in (self.since_log, self.in_all):
            tally.rows, tally.tokens = tally.rows + len(answers), tally.tokens + sum(map(len, answers))
            tally.ended += sum(answer[-1] in self.ends for answer in answers if answer)
            tally.seconds += seconds
        device = batch["input_ids"].device
        made = {name: x.to(device) for name, x in written_batch(prompts, answers, self.fill).items()}
        return {**made, WRITTEN: True}

    def take(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """What is logged now; the next log begins anew."""
        found, self.since_log = self.since_log.summary(gather, device), Tally()
        return {f"on_policy/{name}": value for name, value in found.items()}

    def facts(self) -> dict[str, Any]:
        """What the steps follow from, as JSON has it."""
        share = self.on_policy.share
        of = share.to_dict() if isinstance(share, Schedule) else share
        return {**vars(self.on_policy), "share": of, "eos_token_id": list(self.ends)}

    def _check_weights(self, seed: int, steps: int) -> None:
        weights = {name: term.written("weight") for name, term in without_labels(self.objective).items()}
        off = all_off(weights, steps)
        for step in () if off is None else range(off, steps):
            if self.on_policy.in_step(seed, step, steps) and not any(at_step(weights, step, steps).values()):
                raise ValueError(
                    f"step {step} of {steps} is on-policy, and every weight is 0 then but those of terms that need "
                    "labels, which what the student writes has not: nothing would be learned. Let an outputs, features "
                    "or attention term stay above 0, or give OnPolicy a share that is a Schedule and 0 there."
                )


def seed_of(*parts: int) -> int:
    """A seed that follows from some numbers, below 2⁶³."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def without_labels(objective: Objective) -> dict[str, Term]:
    """The terms that compare something where there are no answers, by name."""
    return {name: term for name, term in objective.terms.items() if not term.needs_labels}
