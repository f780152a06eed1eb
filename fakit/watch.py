"""Watch a student grow like its teacher: CKA layer by layer while it trains, on sequences that are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from fakit.capture import capture
from fakit.evaluation.batches import device_of, to_device
from fakit.layer_maps import LayerMap
from fakit.models.blocks import depth
from fakit.probes import on_the_side
from fakit.similarity import StreamingCKA

if TYPE_CHECKING:
    from fakit.figures import Figure

Batch = Mapping[str, Tensor]
Stack = tuple[list[Tensor], Tensor | None]
"""Hidden states (B, T, d) of the layers that work on the same tokens, and which of these count, bool (B, T)."""


class SimilarityWatch(TrainerCallback):
    """CKA of every student layer with every teacher layer, at the start, every so many optimiser steps and at the end.

    Debiased and cluster-aware: one token a sequence, averaged over all draws, exactly. The student is asked without dropout and
    gradients and left in the mode it was in; random numbers go on as if it had not been asked, so a watched run trains the
    very same student. The teacher is asked once, and its hidden states on these batches are kept.

    An encoder-decoder has two kinds of tokens: its encoder's layers are compared on the input, its decoder's on the target, each
    with the mask of its own, and a pair of layers from different stacks is NaN.

    Args:
        teacher: the frozen teacher.
        batches: held-out sequences, as the models take them (input_ids, attention_mask, …; for an encoder-decoder also
            decoder_input_ids, or labels to make them from), on which nothing is trained: one batch or several; at least 4
            sequences in all.
        every: optimiser steps between two measurements.

    Attributes:
        history: {step: (S + 1, T + 1) CKA, float64, by layer number}.

    >>> watch = SimilarityWatch(teacher, held_out, every=20)  # doctest: +SKIP
    >>> DistillationTrainer(teacher, student, objective, args, train_dataset=rows, callbacks=[watch]).train()  # doctest: +SKIP
    >>> watch.figure(LayerMap.uniform(3, 6))  # doctest: +SKIP

    A hand-written loop calls `watch.measure(student, step)`.
    """

    def __init__(self, teacher: PreTrainedModel, batches: Batch | Sequence[Batch], every: int = 50):
        self.batches = [batches] if isinstance(batches, Mapping) else list(batches)
        sequences = sum(len(next(iter(batch.values()))) for batch in self.batches)
        if every < 1 or sequences < 4:
            raise ValueError(
                f"a watch needs 1 step at least from one measurement to the next and 4 sequences: found every = {every}, "
                f"{sequences} sequences"
            )
        self.teacher, self.every = teacher, every
        self.history: dict[int, Tensor] = {}
        self._theirs: list[list[Stack]] = []

    def measure(self, student: PreTrainedModel, step: int) -> Tensor:
        """CKA (S + 1, T + 1) now; also kept in `history[step]`."""
        if not self._theirs:
            self._theirs = [_stacks(self.teacher, batch) for batch in self.batches]
        streams: list[StreamingCKA] = []
        for batch, theirs in zip(self.batches, self._theirs, strict=True):
            ours = _stacks(student, batch)
            # a model of one stack reads what the other's encoder reads
            streams = streams or [StreamingCKA(clusters=True) for _ in zip(ours, theirs, strict=False)]
            for stream, (x, _), (y, mask) in zip(streams, ours, theirs, strict=False):
                stream.update(x, y, mask)
        sizes = [sum(len(layers) for layers, _ in side) for side in (ours, theirs)]
        values = torch.full(sizes, torch.nan, dtype=torch.float64)
        s = t = 0
        for stream in streams:
            found = stream.matrix()
            values[s : s + len(found), t : t + found.shape[1]] = found
            s, t = s + len(found), t + found.shape[1]
        self.history[step] = values
        return values

    def figure(self, layer_map: LayerMap | None = None) -> Figure:
        """A line for every pair of the map over the steps; without one, for each student layer with the teacher layer it ends most like.

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


def _stacks(model: PreTrainedModel, batch: Batch) -> list[Stack]:
    """All layers by the tokens they work on, in order of their numbers: one stack, or of an encoder-decoder two."""
    with on_the_side(model):
        trace = capture(model, to_device(batch, device_of(model)), range(depth(model) + 1), logits=False)
    layers = [trace.hidden_states[i].cpu() for i in sorted(trace.hidden_states)]
    first = len(layers) if trace.encoder_layers is None else trace.encoder_layers + 1  # layers of the first stack
    stacks = [(layers[:first], trace.mask), (layers[first:], trace.decoder_mask)]
    return [(states, None if mask is None else mask.cpu()) for states, mask in stacks if states]
