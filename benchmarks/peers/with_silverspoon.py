"""SilverSpoon-KD: hidden states, logits and labels, with `HolisticDistiller`. It has no loss of attention maps,
and no padding mask.
"""

from __future__ import annotations

import tempfile

from silverspoon_kd import HolisticDistiller, TrainingArguments, create_alignments

from benchmarks import hand_written
from benchmarks.measure import Way
from benchmarks.models import Size, models, rows_of
from benchmarks.peers.run import run


def silverspoon(size: Size) -> Way:
    """Blocks by name with `mse`, the head with `kl_divergence` at τ = 2,
    half of the weight on the student's own loss.
    """
    teacher, student = models(size)
    alignments = []
    for s, t in hand_written.PAIRS:
        blocks = {rf"^bert\.encoder\.layer\.{t - 1}$": f"bert.encoder.layer.{s - 1}"}
        alignments += create_alignments(teacher, student, blocks, "mse", output_selector_index=0)
    tau = {"temperature": hand_written.TEMPERATURE}
    alignments += create_alignments(teacher, student, {r"^cls$": "cls"}, "kl_divergence", tau)
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), alpha=0.5, report_to="none", use_cpu=True)
    distiller = HolisticDistiller(student, teacher, alignments, rows_of(size, 2, 16), args=arguments)
    for engine in (distiller.teacher_capture, distiller.student_capture):  # as `train()` does first
        engine.register()
    return Way(lambda batch: distiller.compute_distillation_loss(student, batch, True), list(student.parameters()))


if __name__ == "__main__":
    run(silverspoon, hand_written.without_attention, "sdpa")
