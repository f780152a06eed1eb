"""Whole training loops: the trainer beside a bare loop, and an epoch from the teacher's cache beside one with the live
teacher.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, TrainerCallback, TrainingArguments

from benchmarks.hand_written import TEMPERATURE
from benchmarks.measure import agree
from benchmarks.models import Size, classified, collate, models, rows_of
from benchmarks.ways import all_terms, loss_of
from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture

LEARNING_RATE = 1e-4
Run = tuple[float, float]  # seconds, mean loss


def in_turns(ways: dict[str, Callable[[], Run]], repeats: int, rtol: float) -> dict[str, float]:
    """Median seconds of each way. Every run's mean losses must agree."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        losses = {}
        for name, run in ways.items():
            seconds, losses[name] = run()
            taken[name].append(seconds)
        agree(losses, rtol)
    return {name: statistics.median(values) for name, values in taken.items()}


# -- the trainer ------------------------------------------------------------------------------------------------------


class _Clock(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def trainer_against_loop(size: Size, rows: int, tokens: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of a step, optimizer included, the first one left out: {"by hand", "fakit"}.
    The same objective on both sides.
    """
    dataset = rows_of(size, rows * steps, tokens)

    def bare() -> Run:
        teacher, student = models(size)
        objective = all_terms()
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        losses, ends = [], []
        for batch in DataLoader(dataset, rows, collate_fn=collate):
            loss = loss_of(objective, teacher, student, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            ends.append(time.perf_counter())
        return (ends[-1] - ends[0]) / (steps - 1), torch.stack(losses).mean().item()

    def trained() -> Run:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=rows,
                train_sampling_strategy="sequential",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            trainer = DistillationTrainer(
                *models(size),
                all_terms(),
                arguments,
                train_dataset=dataset,
                data_collator=collate,
                callbacks=[clock],
            )
            loss = trainer.train().training_loss
        return (clock.ends[-1] - clock.ends[0]) / (steps - 1), loss

    return in_turns({"by hand": bare, "fakit": trained}, repeats, rtol=1e-3)


# -- the cache --------------------------------------------------------------------------------------------------------


def cache_against_live(size: Size, rows: int, tokens: int, steps: int, repeats: int, head: str) -> dict[str, float]:
    """Seconds of an epoch: {"live teacher", "fakit"}. The cache in bf16, rows shuffled; building it is not counted:
    one pass of the teacher, once.

    Args:
        head: "classes", all four terms under a head of two classes; or "vocabulary", features, attention and masked
            tokens under a head of `size.vocabulary`, which costs the student as much as seven of its layers,
            with a teacher or without.
    """
    depth = size.teacher_layers
    pairs = [(s, s * depth // size.student_layers) for s in range(1, size.student_layers + 1)]
    dataset = rows_of(size, rows * steps, tokens)
    if head == "classes":
        dataset = classified(dataset)
        teacher, student = models(size, head=BertForSequenceClassification)
        outputs = Outputs("forward_kl", temperature=TEMPERATURE)
    else:
        teacher, student = models(size)
        outputs = None
    objective = Objective(LayerMap(pairs), Features("mse"), Attention("kl"), outputs, Task())
    given, needs = objective.needs("teacher"), objective.needs("student")
    numbered = [row | {"row": torch.tensor(i)} for i, row in enumerate(dataset)]

    def epoch(theirs: Callable) -> Run:
        losses = []
        start = time.perf_counter()
        shuffled = torch.Generator().manual_seed(0)
        for batch in DataLoader(numbered, rows, shuffle=True, generator=shuffled, collate_fn=collate):
            wanted = theirs(batch.pop("row").tolist(), batch)
            ours = capture(student, batch, needs.hidden_states, needs.attentions, needs.capture_logits)
            loss = objective(ours, wanted, batch["labels"]).total
            loss.backward()
            student.zero_grad()
            losses.append(loss.detach())
        return time.perf_counter() - start, torch.stack(losses).mean().item()

    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.build(folder, teacher, dataset, needs=given)

        def live(numbers: Iterable[int], batch: dict):
            with torch.no_grad():
                return capture(teacher, batch, given.hidden_states, given.attentions, given.capture_logits)

        def cached(numbers: Iterable[int], batch: dict):
            return cache.trace(numbers, batch["attention_mask"])

        return in_turns({"live teacher": lambda: epoch(live), "fakit": lambda: epoch(cached)}, repeats, rtol=1e-2)
