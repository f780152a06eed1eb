"""Looks at a student while it trains: how similar its layers have become to the teacher's,
and what both say to a few examples.

A probe asks the models on the side. It leaves no trace in the run: no gradient, the modules' modes restored,
random numbers untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fakit.evaluation.batches import device_of, eval_mode, to_device
from fakit.evaluation.generation import generate
from fakit.models.blocks import depth, encoder_depth
from fakit.models.kinds import is_causal_lm
from fakit.models.random_state import random_state_kept
from fakit.similarity import StreamingCKA
from fakit.tasks.special_tokens import added_tokens
from fakit.tracing.capture import capture

Answer = tuple[str, float | None]  # label (or text) and its probability (a text has none)


@contextmanager
def on_the_side(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradient; modes and random numbers afterwards are as they were."""
    with torch.no_grad(), eval_mode(model), random_state_kept(device_of(model)):
        yield


Batch = Mapping[str, Tensor]
Stack = tuple[list[Tensor], Tensor | None]
"""Hidden states (B, T, d) of the layers that work on the same tokens, and which of these count, bool (B, T)."""


class LayerSimilarity:
    """CKA of every student layer with every teacher layer on held-out batches, which stay the same:
    what every live view of it asks.

    Debiased and cluster-aware: one token a sequence (tokens of one sequence are no independent rows), averaged over all
    draws, exactly and without random numbers. Both models are asked without dropout and gradients. The teacher is asked
    once, and its hidden states on these batches are kept.

    An encoder-decoder has two kinds of tokens: its encoder's layers are compared on the input, its decoder's on the
    target, each with the mask of its own, and a pair of layers from different stacks is NaN.

    Args:
        teacher: the frozen teacher.
        batches: held-out sequences, as the models take them (input_ids, attention_mask, …; for an encoder-decoder also
            decoder_input_ids, or labels to make them from): one batch or several; at least 4 sequences in all.

    Raises:
        ValueError: fewer than 4 sequences.
    """

    def __init__(self, teacher: PreTrainedModel, batches: Batch | Sequence[Batch]) -> None:
        self.batches = [batches] if isinstance(batches, Mapping) else list(batches)
        sequences = sum(len(next(iter(batch.values()))) for batch in self.batches)
        if sequences < 4:
            raise ValueError(
                f"the held-out batch has {sequences} sequences; debiased CKA needs at least 4, and says little below 32"
            )
        self.teacher = teacher
        self._theirs: list[list[Stack]] = []

    def __call__(self, student: PreTrainedModel) -> Tensor:
        """(S + 1, T + 1) float64: rows and columns by layer number, 0 the embeddings."""
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
        return values


def _stacks(model: PreTrainedModel, batch: Batch) -> list[Stack]:
    """All layers by the tokens they work on, in order of their numbers: one stack, or of an encoder-decoder two."""
    with on_the_side(model):
        trace = capture(model, to_device(batch, device_of(model)), range(depth(model) + 1), logits=False)
    layers = [trace.hidden_states[i].cpu() for i in sorted(trace.hidden_states)]
    first = len(layers) if trace.encoder_layers is None else trace.encoder_layers + 1  # layers of the first stack
    stacks = [(layers[:first], trace.mask), (layers[first:], trace.decoder_mask)]
    return [(states, None if mask is None else mask.cpu()) for states, mask in stacks if states]


class LayerProbe:
    """`LayerSimilarity` of one student with its teacher, as an array. Of an encoder-decoder it is the encoder's layers.

    Args:
        teacher, student: the models.
        batch: input_ids and attention_mask (B, T), with B ≥ 4.

    Raises:
        ValueError: fewer than 4 sequences.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> None:
        self.student, self._similarity = student, LayerSimilarity(teacher, batch)

    def __call__(self) -> np.ndarray:
        """(S + 1, T + 1) float64: rows and columns by layer number, 0 the embeddings."""
        layers = [encoder_depth(model) for model in (self.student, self._similarity.teacher)]
        rows, columns = (None if count is None else count + 1 for count in layers)
        return self._similarity(self.student)[:rows, :columns].numpy()


@dataclass(frozen=True)
class Sample:
    """One fixed example, and what both models say to it: a label with its probability, or the text that follows.

    `teacher` is None where no teacher is at hand (a cache stands for it).
    """

    text: str
    teacher: Answer | None
    student: Answer

    @property
    def agree(self) -> bool | None:
        """Whether both say the same; None without a teacher."""
        return None if self.teacher is None else self.teacher[0] == self.student[0]


class SampleProbe:
    """What teacher and student say to a few fixed texts. The teacher is asked once.

    Args:
        teacher: None where a cache stands for it.
        student: a classifier, or a causal language model, which goes on with each text greedily.
        texts: the examples.
        tokenizer: of both models.
        label_names: names of the classes; by default those of the student's configuration.
        new_tokens: length of a continuation, in tokens.

    Raises:
        ValueError: no texts, or label names that are not as many as the student's classes.
    """

    def __init__(
        self,
        teacher: PreTrainedModel | None,
        student: PreTrainedModel,
        texts: Sequence[str],
        tokenizer,
        label_names: Sequence[str] | None = None,
        new_tokens: int = 12,
    ) -> None:
        if not texts:
            raise ValueError("no sample texts: give at least one, or leave samples out")
        self.student, self.texts, self.tokenizer, self.new_tokens = student, list(texts), tokenizer, new_tokens
        self.causal = is_causal_lm(student)
        self.label_names = None if self.causal else _names(student, label_names)
        self._teacher, self._teacher_says = teacher, None

    def __call__(self) -> list[Sample]:
        """One `Sample` a text, in the order given."""
        if self._teacher_says is None:
            none: list[Answer | None] = [None] * len(self.texts)
            self._teacher_says = none if self._teacher is None else self._ask(self._teacher)
        said = zip(self.texts, self._teacher_says, self._ask(self.student), strict=True)
        return [Sample(text, theirs, ours) for text, theirs, ours in said]

    def _ask(self, model: PreTrainedModel) -> list[Answer]:
        with on_the_side(model):
            return self._continued(model) if self.causal else self._classified(model)

    def _classified(self, model: PreTrainedModel) -> list[Answer]:
        room = min(128, getattr(model.config, "max_position_embeddings", None) or 128)
        batch = self.tokenizer(self.texts, padding=True, truncation=True, max_length=room, return_tensors="pt")
        logits = capture(model, to_device(batch, device_of(model))).logits
        if logits is None or logits.dim() != 2:
            found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"{type(model).__name__} gives {found}; samples are for classifiers (B, C) and causal language models. "
                "Leave samples out."
            )
        logits = logits.float()  # (B, C)
        if logits.shape[-1] == 1:
            return [(f"{value:.3f}", None) for value in logits[:, 0].tolist()]
        chances, classes = logits.softmax(-1).max(-1)  # (B,)
        return [(self.label_names[c], p) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    def _continued(self, model: PreTrainedModel) -> list[Answer]:
        begin, _ = added_tokens(self.tokenizer)  # an end that the tokenizer adds would end the prompt
        prompts = [begin + self.tokenizer(text, add_special_tokens=False).input_ids for text in self.texts]
        end = self.tokenizer.eos_token_id
        end = -1 if end is None else end  # none: every text runs to its full length
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        new = generate(model, prompts, end, pad, self.new_tokens)
        return [(self.tokenizer.decode(tokens), None) for tokens in new]


def _names(student: PreTrainedModel, label_names: Sequence[str] | None) -> list[str]:
    count = student.config.num_labels
    own = [student.config.id2label[i] for i in range(count)]
    if label_names is None:
        return own
    if len(label_names) != count:
        raise ValueError(
            f"{len(label_names)} label names for a student of {count} classes ({', '.join(own)}); give one name a class"
        )
    return list(label_names)
