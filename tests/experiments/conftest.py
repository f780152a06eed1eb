"""A toy world on disk: a small untrained teacher with its tokenizer, and files of sentences that name an animal."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from fakit.experiments.config import ExperimentConfig

ANIMALS = {"cat": ["purrs", "meows"], "dog": ["barks", "wags"], "cow": ["moos", "chews"]}
FILLER = ["the", "one", "that", "often", "here", "and", "there", "loudly", "today"]
WORDS = [word for verbs in ANIMALS.values() for word in verbs] + FILLER
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]


def _tokenizer(causal: bool) -> PreTrainedTokenizerFast:
    characters = list("abcdefghijklmnopqrstuvwxyz .>|=\n") if causal else []
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(characters or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    if causal:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]" if causal else None
    )


def _sentence(rng: random.Random, label: str) -> str:
    words = [rng.choice(FILLER) for _ in range(rng.randint(3, 8))] + [rng.choice(ANIMALS[label])]
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder: teacher/ (BERT, 4 layers × 16), causal/ (GPT-2, 2 layers × 16), animals.jsonl, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    rows = [{"text": _sentence(rng, label), "label": label} for _ in range(120) for label in ANIMALS]
    _write(folder / "animals.jsonl", rows)
    _write(folder / "pairs.jsonl", [{"source": row["text"].replace("t", "f"), "target": row["text"]} for row in rows])

    torch.manual_seed(0)
    tokenizer = _tokenizer(causal=False)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.5,  # so that attention and states differ from layer to layer, untrained as it is
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")

    tokenizer = _tokenizer(causal=True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=160, bos_token_id=4, eos_token_id=4
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(world) -> ExperimentConfig:
    """All three terms, 30 labels and a pool, six steps."""
    return ExperimentConfig.from_dict(
        {
            "task": {
                "name": str(world / "animals.jsonl"),
                "labels": 30,
                "options": {"validation": 40, "test": 60, "pool": 150},
            },
            "teacher": {"id": str(world / "teacher")},
            "student": {"layers": 2},
            "training": {"steps": 6, "batch_size": 8, "log_every": 2, "max_length": 16, "learning_rate": 1e-3}
            | {"bf16": False},  # the same on every processor
            "device": "cpu",
        }
    )
