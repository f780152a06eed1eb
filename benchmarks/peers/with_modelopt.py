"""NVIDIA ModelOpt: hidden states, logits and labels, with `modelopt.torch.distill.convert` and `compute_kd_loss`.

It compares whole tensors, padding included, and has no loss of attention maps.
"""

from __future__ import annotations

import modelopt.torch.distill as mtd
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from benchmarks import hand_written
from benchmarks.measure import Way
from benchmarks.models import Size, models
from benchmarks.peers.run import run


class HiddenStateLoss(_Loss):
    """Mean squared error of what two blocks return."""

    def forward(self, ours, theirs):
        ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
        return F.mse_loss(ours, theirs)


def modelopt(size: Size) -> Way:
    """Blocks by name, the head's logits, and the student's own loss, by a static balancer."""
    teacher, student = models(size)
    criterion = {
        (f"bert.encoder.layer.{s - 1}", f"bert.encoder.layer.{t - 1}"): HiddenStateLoss() for s, t in hand_written.PAIRS
    }
    criterion["cls", "cls"] = mtd.LogitsDistillationLoss(hand_written.TEMPERATURE, reduction="batchmean")
    balancer = mtd.StaticLossBalancer([1 / 6, 1 / 6, 1 / 6, 1 / 4])  # the rest, 1/4, is the student's own
    student = mtd.convert(
        student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer})]
    )
    student.train()

    def loss(batch):
        return student.compute_kd_loss(student_loss=student(**batch).loss)

    return Way(loss, [p for p in student.parameters() if p.requires_grad])


if __name__ == "__main__":
    run(modelopt, hand_written.without_attention, "sdpa")
