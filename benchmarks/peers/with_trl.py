"""TRL: logits alone, with the loss of `GKDTrainer`; β = 0 is the forward KL. Its trainers take causal models only.

`GKDTrainer` of 1.16.0 does not hand its own temperature to this loss; here the loss is called with it.
"""

from __future__ import annotations

import torch
from trl.experimental.gkd import GKDTrainer

from benchmarks import hand_written
from benchmarks.measure import Way
from benchmarks.models import Size, models
from benchmarks.peers.run import run


def trl(size: Size) -> Way:
    """What `GKDTrainer.compute_loss` does, without the shift of a causal model."""
    teacher, student = models(size)

    def loss(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours = student(**inputs).logits
        with torch.no_grad():
            theirs = teacher(**inputs).logits
        counted = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        return GKDTrainer.generalized_jsd_loss(ours, theirs, counted, beta=0, temperature=hand_written.TEMPERATURE)

    return Way(loss, list(student.parameters()))


if __name__ == "__main__":
    run(trl, hand_written.outputs_alone, "sdpa")
