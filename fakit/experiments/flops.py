"""FLOPs of an optimizer step, measured on the run's own batches before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fakit.experiments.build import TrainingRows

if TYPE_CHECKING:
    from fakit.training.trainer import DistillationTrainer


def step_flops(trainer: DistillationTrainer, rows: TrainingRows, batches: int = 4) -> float | None:
    """FLOPs of one optimizer step, forward and backward, teacher included: the mean over typical batches, and over the
    steps where a schedule switches terms on and off.

    The teacher's forward ends where the objective needs no more of it, and this counts what is done. None for a
    quantized teacher, and under balancing by gradient norms, of which some steps cost more. Random numbers drawn here
    (dropout) do not count, and what an objective learns from a batch by itself (`EarthMover`'s masses) is put back: the
    run goes on as if nothing was measured.
    """
    from accelerate.utils import send_to_device

    from fakit.evaluation.cost import count_flops
    from fakit.models.load import is_quantized
    from fakit.models.random_state import random_state_kept
    from fakit.objective.balancing import GradientNorm

    if is_quantized(trainer.teacher) or isinstance(trainer.objective.balancing, GradientNorm):
        return None
    distiller, device = trainer.model, trainer.args.device
    distiller.to(device)
    trainer.gather_as_asked()
    objective, steps = trainer.objective, trainer.args.max_steps
    # the steps with the same terms on cost the same, and the first of them stands for all
    on: dict[tuple[str, ...], list[int]] = {}
    for step in range(steps if objective.weights.schedules else 1):
        objective.set_step(step, of=steps)
        on.setdefault(tuple(filter(objective.active, objective.terms)), []).append(step)
    was_training = distiller.training
    trainable = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    counts = []
    with random_state_kept(device), objective.buffers_kept():
        distiller.train()
        for examples in rows.typical_batches(batches):
            batch = send_to_device(trainer.data_collator(examples), device)

            def step(batch=batch):
                torch.autograd.grad(distiller(**batch)["loss"], trainable, allow_unused=True)

            for alike in on.values():
                objective.set_step(alike[0], of=steps)
                counts.append(count_flops(step) * len(alike))
        distiller.train(was_training)
    objective.set_step(0, of=steps)
    per_batch = sum(counts) / batches / sum(map(len, on.values()))
    return per_batch * trainer.args.gradient_accumulation_steps * trainer.args.world_size
