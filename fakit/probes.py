"""Looks at a student while it trains: how similar its layers have become to the teacher's, and what both say to a few examples.

A probe asks the models on the side. It leaves no trace in the run: no gradient, the modules' modes restored, random numbers untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fakit.capture import capture, is_causal_lm
from fakit.evaluation.batches import device_of, eval_mode, to_device
from fakit.evaluation.generation import generate
from fakit.models.blocks import depth, encoder_depth, is_encoder_decoder
from fakit.models.random_state import random_state_kept
from fakit.similarity import compare_layers

Answer = tuple[str, float | None]  # label (or text) and its probability (a text has none)


@contextmanager
def on_the_side(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradient; modes and random numbers afterwards are as they were."""
    with torch.no_grad(), eval_mode(model), random_state_kept(device_of(model)):
        yield


class LayerProbe:
    """CKA of every student layer with every teacher layer on one held-out batch, which stays the same all along.

    Each value is the debiased CKA over sequences (one token a sequence, the mean over `draws` draws): tokens of one sequence are no
    independent rows. The teacher answers once; each call runs the student alone. Of an encoder-decoder it is the encoder's layers.

    Args:
        teacher, student: the models.
        batch: input_ids and attention_mask (B, T), with B ≥ 4; labels are not looked at.
        draws: tokens drawn of each sequence.
        seed: of the draws; the same tokens at every call.

    Raises:
        ValueError: fewer than 4 sequences.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        batch: Mapping[str, Tensor],
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        rows = len(next(iter(batch.values())))
        if rows < 4:
            raise ValueError(
                f"the held-out batch has {rows} sequences; debiased CKA needs at least 4, and says little below 32"
            )
        self.student, self.batch, self.draws, self.seed = student, dict(batch), draws, seed
        self._teacher, self._layers = teacher, None

    def __call__(self) -> np.ndarray:
        """(S + 1, T + 1) float64: rows and columns by layer number, 0 the embeddings."""
        if self._layers is None:
            self._layers, _ = self._run(self._teacher)
        ours, mask = self._run(self.student)
        theirs = [layer.to(ours[0].device) for layer in self._layers]
        return compare_layers(ours, theirs, mask, draws=self.draws, permutations=0, bootstrap=0, seed=self.seed).values

    def _run(self, model: PreTrainedModel) -> tuple[list[Tensor], Tensor]:
        layers = range(1 + (encoder_depth(model) if is_encoder_decoder(model) else depth(model)))
        with on_the_side(model):
            trace = capture(model, to_device(self.batch, device_of(model)), layers, logits=is_encoder_decoder(model))
        mask = trace.mask
        if mask is None:  # no padding was marked: every position counts
            mask = torch.ones(trace.hidden_states[0].shape[:2], dtype=torch.bool, device=trace.hidden_states[0].device)
        return [trace.hidden_states[i].float() for i in layers], mask


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
        prompts = [self.tokenizer(text).input_ids for text in self.texts]
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
