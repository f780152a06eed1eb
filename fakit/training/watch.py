"""Watch a student grow like its teacher: CKA layer by layer while it trains, on sequences that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from fakit.layer_maps import LayerMap
from fakit.training.probes import Batch, LayerSimilarity

if TYPE_CHECKING:
    from fakit.figures import Figure


class SimilarityWatch(TrainerCallback):
    """CKA of every student layer with every teacher layer, at the start, every so many optimizer steps and at the end.

    See `fakit.training.probes.LayerSimilarity` for what is measured. The student is left in the mode it was in; random
    numbers go on as if it had not been asked, so a watched run trains the very same student.

    Args:
        teacher: the frozen teacher.
        batches: held-out sequences, as the models take them (input_ids, attention_mask, …; for an encoder-decoder also
            decoder_input_ids, or labels to make them from), on which nothing is trained: one batch or several; at least
            4 sequences in all.
        every: optimizer steps between two measurements.

    Attributes:
        history: {step: (S + 1, T + 1) CKA, float64, by layer number}.

    >>> watch = SimilarityWatch(teacher, held_out, every=20)  # doctest: +SKIP
    >>> trainer = DistillationTrainer(  # doctest: +SKIP
    ...     teacher, student, objective, args, train_dataset=rows, callbacks=[watch]
    ... )
    >>> trainer.train()  # doctest: +SKIP
    >>> watch.figure(LayerMap.uniform(3, 6))  # doctest: +SKIP

    A hand-written loop calls `watch.measure(student, step)`.
    """

    def __init__(self, teacher: PreTrainedModel, batches: Batch | Sequence[Batch], every: int = 50):
        self._similarity = LayerSimilarity(teacher, batches)
        if every < 1:
            raise ValueError(f"a watch needs 1 step at least from one measurement to the next: found every = {every}")
        self.every = every
        self.history: dict[int, Tensor] = {}

    def measure(self, student: PreTrainedModel, step: int) -> Tensor:
        """CKA (S + 1, T + 1) now; also kept in `history[step]`."""
        self.history[step] = self._similarity(student)
        return self.history[step]

    def figure(self, layer_map: LayerMap | None = None) -> Figure:
        """A line for every pair of the map over the steps; without one,
        for each student layer with the teacher layer it ends most like.

        Raises:
            ValueError: nothing measured yet, or a map of other depths.
        """
        from fakit.figures import similarity_over_steps

        if not self.history:
            raise ValueError(
                "nothing was measured yet: give the watch to a trainer (callbacks=[watch]), or call measure"
            )
        steps = sorted(self.history)
        last = self.history[steps[-1]]
        if layer_map is None:
            pairs = [
                (s, int(last[s].nan_to_num(-2).argmax())) for s in range(1, len(last)) if not last[s].isnan().all()
            ]
        else:
            layer_map.check(last.shape[0] - 1, last.shape[1] - 1)
            pairs = list(layer_map.pairs)
        return similarity_over_steps(
            steps, {f"S{s} and T{t}": [float(self.history[step][s, t]) for step in steps] for s, t in pairs}
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Before the first step; of a resumed run, before the next."""
        self.measure(_student(model), state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Every `every` steps."""
        if state.global_step % self.every == 0:
            self.measure(_student(model), state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """The last step, if it was not measured."""
        if state.global_step not in self.history:
            self.measure(_student(model), state.global_step)


def _student(model) -> PreTrainedModel:
    """The student inside a `Distiller`; a plain model is itself."""
    return getattr(model, "student", model)
