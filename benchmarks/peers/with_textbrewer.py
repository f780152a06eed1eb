"""TextBrewer: hidden states, attention maps, logits and labels, with `GeneralDistiller.train_on_batch`."""

from __future__ import annotations

import tempfile

from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

from benchmarks import hand_written
from benchmarks.measure import Way
from benchmarks.models import Size, models, random_batch
from benchmarks.peers.run import run

ASKED = {"output_hidden_states": True, "output_attentions": True}


def adaptor(batch, outputs) -> dict:
    """What TextBrewer wants to be told of a model's outputs."""
    return {
        "logits": outputs.logits,
        "logits_mask": batch["attention_mask"],
        "hidden": outputs.hidden_states,
        "attention": outputs.attentions,
        "inputs_mask": batch["attention_mask"],
        "losses": outputs.loss,
    }


def textbrewer(size: Size, attention: str = "eager") -> Way:
    """Its nearest losses: `hidden_mse`, `attention_ce` (a cross-entropy of softmax(maps)), `ce` at τ = 2,
    and the model's own loss.
    """
    teacher, student = models(size, attention)
    matches = [
        match
        for s, t in hand_written.PAIRS
        for match in (
            {"layer_T": t, "layer_S": s, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / 3},
            {"layer_T": t - 1, "layer_S": s - 1, "feature": "attention", "loss": "attention_ce", "weight": 1 / 3},
        )
    ]
    config = DistillationConfig(
        temperature=hand_written.TEMPERATURE, hard_label_weight=1, kd_loss_type="ce", intermediate_matches=matches
    )
    training = TrainingConfig(device="cpu", output_dir=tempfile.mkdtemp())
    distiller = GeneralDistiller(training, config, teacher, student, adaptor, adaptor)
    return Way(lambda batch: distiller.train_on_batch(batch, ASKED)[0], list(student.parameters()))


def under_fused_attention(size: Size) -> str:
    """What it does where the models run transformers' default attention."""
    try:
        loss = textbrewer(size, "sdpa").step(random_batch(size, 2, 16))
    except Exception as error:  # whatever it is, it is the finding
        return f"needs eager attention; under sdpa: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"under sdpa: loss {loss:.4g}"


if __name__ == "__main__":
    run(textbrewer, hand_written.all_terms, "eager", under_fused_attention)
