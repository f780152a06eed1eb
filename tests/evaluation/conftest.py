"""Tiny random models and tokenizers: real transformers classes, no network, milliseconds a forward pass."""

from __future__ import annotations

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

WORDS = [
    "the",
    "a",
    "film",
    "story",
    "was",
    "is",
    "very",
    "good",
    "bad",
    "fine",
    "dull",
    "bright",
    "long",
    "short",
    "and",
    "but",
    "not",
]
CHARACTERS = list("\n abcdefghijklmnopqrstuvwxyz.éü")


def make_bert(labels: int = 3, layers: int = 2, seed: int = 0, vocab_size: int = 40) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=labels,
        initializer_range=0.5,  # large, so that outputs differ and a wrong order or mask shows
    )
    return BertForSequenceClassification(config).eval()


def make_gpt2(layers: int = 2, seed: int = 0, vocab_size: int = 35, positions: int = 48) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=positions,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] words [SEP]."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_character_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; with `bos`, every text starts behind <bos>."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def bert():
    """bert(labels=3, layers=2, seed=0, vocab_size=40) → a classifier."""
    return make_bert


@pytest.fixture
def gpt2():
    """gpt2(layers=2, seed=0, vocab_size=35, positions=48) → a causal language model."""
    return make_gpt2


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return make_word_tokenizer()


@pytest.fixture
def characters():
    """characters(bos=False) → a tokenizer."""
    return make_character_tokenizer
