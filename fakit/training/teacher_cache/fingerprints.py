"""Whose cache is it: fingerprints of a teacher, a tokenized data set and a tokenizer."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# What a configuration says beside what the forward pass computes.
_ASIDE = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "problem_type",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all weights (of a quantized model: codes and scales)
    and over the configuration.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(json.dumps(shaping_facts(model.config), sort_keys=True).encode())
    return digest.hexdigest()


def config_facts(config) -> dict:
    """A transformers configuration as plain JSON, in which infinities and NaN are written as {"__float__":
    "Infinity"}.
    """
    return json.loads(config.to_json_string(use_diff=False))


def shaping_facts(config) -> dict:
    """What a transformers configuration says of what the forward pass computes, as plain JSON."""
    return _shaping(config_facts(config))


def config_values(facts: dict) -> dict:
    """What a configuration held, from its `config_facts`: infinities and NaN are floats again."""
    return json.loads(json.dumps(facts), object_hook=_float)


def _float(found: dict) -> dict | float:
    return float(found["__float__"]) if set(found) == {"__float__"} else found


def _shaping(config: dict) -> dict:
    kept = {key: value for key, value in config.items() if key not in _ASIDE}
    return {key: _shaping(value) if isinstance(value, dict) else value for key, value in kept.items()}


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 over the vocabulary and the special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def row_hashes(dataset, columns: Sequence[str] = MODEL_INPUTS) -> list[int]:
    """A number of 63 bits for each row, of what the model is given: token ids, padding, token types, positions;
    not of labels or text.

    A row without attention_mask is a row whose tokens all count. `columns`: what the model is given,
    where it is something else.

    Raises:
        ValueError: a row without input_ids.
    """
    digests = (hashlib.sha256(_canonical(row, columns)).digest() for row in rows_of(dataset, columns))
    return [int.from_bytes(digest[:8]) >> 1 for digest in digests]


def data_fingerprint(dataset) -> str:
    """sha256 over `row_hashes`: tokenizer, truncation and order are all in it."""
    return combined(row_hashes(dataset))


def combined(hashes: list[int]) -> str:
    """sha256 over the hashes of rows, in order."""
    return hashlib.sha256(np.asarray(hashes, dtype="<i8").tobytes()).hexdigest()


def rows_of(dataset, columns: Sequence[str] | None = None) -> Iterator[Mapping]:
    """The rows of a data set, one after another; of a `datasets.Dataset` as they are stored,
    and only those of `columns`.

    Raises:
        ValueError: a stream, whose rows have no numbers.
    """
    from datasets import Dataset

    if not hasattr(type(dataset), "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} is a stream: it has no length and its rows have no numbers, and a cache finds "
            "the teacher's answers by them. Give a data set with rows (datasets.Dataset, a list), or train with the "
            "live teacher."
        )
    if isinstance(dataset, Dataset):  # no text is decoded, no format (torch, numpy) applied
        names = [name for name in dataset.column_names if columns is None or name in columns]
        dataset = dataset.with_format(None).select_columns(names)
    return (dataset[i] for i in range(len(dataset)))


def _canonical(row: Mapping, columns: Sequence[str]) -> bytes:
    values = {name: _list(row[name]) for name in columns if row.get(name) is not None}
    if "input_ids" not in values:
        raise ValueError(
            f"a row of the data set holds {sorted(row)}; a cache is made of tokenized rows, with input_ids (T,): "
            "tokenize the data set first."
        )
    values.setdefault("attention_mask", [1] * len(values["input_ids"]))
    return json.dumps(values, sort_keys=True).encode()


def _list(values) -> list:
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else np.asarray(values).tolist()
