"""What every way is given: teacher, student and batch, of one size and one seed.
Imports torch and transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForMaskedLM, BertPreTrainedModel


@dataclass(frozen=True)
class Size:
    """BERT with random weights and dropout 0, so that two ways can be compared number by number."""

    teacher_layers: int = 6
    student_layers: int = 3
    width: int = 384
    heads: int = 12
    vocabulary: int = 30_522
    positions: int = 4096

    def config(self, layers: int) -> BertConfig:
        """The configuration of a model with so many layers."""
        return BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def with_teacher(self, layers: int) -> Size:
        """The same with another depth of the teacher."""
        return replace(self, teacher_layers=layers)


FULL = Size()
QUICK = Size(width=32, heads=4, vocabulary=9_000, positions=256)  # large enough a vocabulary to be chunked

Batch = dict[str, Tensor]


def models(
    size: Size,
    attention: str = "sdpa",
    head: type[BertPreTrainedModel] = BertForMaskedLM,
    device: torch.device | str = "cpu",
) -> tuple[BertPreTrainedModel, BertPreTrainedModel]:
    """Teacher, frozen and in eval mode, and student, in train mode; the same weights in every process and on every
    device.
    """
    torch.manual_seed(0)
    teacher, student = (
        head._from_config(size.config(layers), attn_implementation=attention).to(device)
        for layers in (size.teacher_layers, size.student_layers)
    )
    return teacher.eval().requires_grad_(False), student.train()


def random_batch(size: Size, rows: int, tokens: int, seed: int = 0) -> Batch:
    """input_ids, attention_mask and MLM labels on 15 % of the tokens, (B, T) each. Of several rows,
    the last is a quarter padding.
    """
    random = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1000, size.vocabulary, (rows, tokens), generator=random)
    attention_mask = torch.ones_like(input_ids)
    if rows > 1:
        attention_mask[-1, -(tokens // 4) :] = 0
    chosen = (torch.rand(rows, tokens, generator=random) < 0.15) & attention_mask.bool()
    chosen[0, 0] = True
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.where(chosen, input_ids, -100),
    }


def rows_of(size: Size, rows: int, tokens: int) -> list[dict]:
    """A data set of random rows, each {"input_ids", "attention_mask", "labels"} of (T,); the last row is shorter."""
    batch = random_batch(size, rows, tokens)
    counts = batch["attention_mask"].bool()
    return [{name: value[i][counts[i]] for name, value in batch.items()} for i in range(rows)]


def classified(rows: list[dict]) -> list[dict]:
    """The same rows with one label of two each."""
    return [row | {"labels": torch.tensor(i % 2)} for i, row in enumerate(rows)]


def collate(rows: list[dict]) -> Batch:
    """A batch, padded to its longest row."""
    padding = {"labels": -100}  # the rest with 0
    return {
        name: torch.stack([row[name] for row in rows])
        if rows[0][name].dim() == 0
        else pad_sequence([row[name] for row in rows], True, padding.get(name, 0))
        for name in rows[0]
    }
