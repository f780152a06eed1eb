"""The README's code blocks, and the files that they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def lay_out(folder: Path) -> None:
    """`my_texts.csv` and `my-teacher`, a small classifier with its tokenizer."""
    words = ["good", "bad", "film", "plot", "dull", "fine", "the", "a"]
    rows = [f"the {a} {b} {c},{int(a in ('good', 'fine'))}" for a in words for b in words for c in words[:2]]
    (folder / "my_texts.csv").write_text("\n".join(["text,label", *dict.fromkeys(rows)]) + "\n")
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder / "my-teacher")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "my-teacher")
