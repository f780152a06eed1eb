"""What others computed of a teacher: files of its largest log-probabilities at every token of a text.

Read are JSON lines, a JSON array or object, and parquet, of two kinds:

* **What a vLLM server answers** to completions, chat completions or a batch file with `prompt_logprobs: k`. Of every
  text, `prompt_logprobs` is a list: null for its first token, then for each token a mapping {token id as a string:
  {"logprob", "rank", "decoded_token"}} of the k likeliest in its place, and of the token itself where it is not among
  them, so that k + 1 entries occur. `prompt_token_ids` beside it (asked for by `return_token_ids`) says which text it
  is; without it, every token of the text must be among the entries in its place.
* **Rows of columns**: `input_ids` (n), `top_ids` and `top_logprobs` (n or n - 1 lists of k), where entry t is of the
  distribution behind token t, that of token t + 1. In place of the latter two `compressed_logprobs` and
  `bytepacked_indices` (n or n - 1 lists of bytes), DistillKit's, where its settings are given
  (`fakit.training.teacher_cache.compressed`).

Logarithms are natural, at temperature 1, of the full softmax (vLLM's `logprobs_mode: raw_logprobs`, its default).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fakit.training.teacher_cache.compressed import COMPRESSED, LEGACY, Compression

COLUMNS = ("input_ids", "top_ids", "top_logprobs")
IMPOSSIBLE = -9999.0
"""What vLLM writes for a logarithm of 0, as JSON has no infinity."""


@dataclass(frozen=True)
class Answer:
    """A teacher's largest log-probabilities at a text of n tokens.

    Attributes:
        where: file and number, for messages.
        tokens: n.
        input_ids: the text's; None where the file does not say.
        indices, values: (n - 1, k), entry t of the distribution behind token t.
        given: what else the file says of token t + 1: the ids that stand in its place, of which it is one. None where
            `input_ids` says it.
    """

    where: str
    tokens: int
    input_ids: list[int] | None
    indices: Tensor
    values: Tensor
    given: Sequence[Sequence[int]] | None = None

    def check(self, number: int, ids: Sequence[int], tokenizer=None) -> None:
        """Raise ValueError unless it is of the text `ids`, row `number` of a data set: the first place that differs."""

        def named(token: int) -> str:
            return f"{token}" if tokenizer is None else f"{token} ({tokenizer.decode([token])!r})"

        fix = "The server's tokenizer or template is another, or its answers are in another order: send token ids."
        if self.input_ids is not None:
            for place, (ours, theirs) in enumerate(zip(ids, self.input_ids, strict=False)):
                if ours != theirs:
                    raise ValueError(
                        f"{self.where} is not of row {number}: at position {place} the row's token is {named(ours)}, "
                        f"the file's {named(theirs)}. {fix}"
                    )
        if self.tokens != len(ids):
            raise ValueError(f"{self.where} has {self.tokens} tokens, and row {number} has {len(ids)}. {fix}")
        for place, (token, entries) in enumerate(zip(ids[1:], self.given or (), strict=False), 1):
            if token not in entries:
                theirs = ", ".join(map(named, sorted(entries)[:3])) + " …" * (len(entries) > 3)
                raise ValueError(
                    f"{self.where} is not of row {number}: at position {place} the row's token is {named(token)}, and "
                    f"the file's is {'one of ' * (len(entries) > 1)}{theirs}. {fix}"
                )


def read_answers(
    files: Sequence[str | Path], top_k: int | None = None, compression: Compression | None = None
) -> Iterator[Answer]:
    """The answers of files, one after another.

    Args:
        compression: how DistillKit's columns are packed.
        top_k: keep so many of each distribution; None: as many as all of a text's have.

    Raises:
        ValueError: a file that is of neither kind, or a distribution that is none; names file, number and position.
    """
    for file in map(Path, files):
        for number, found in enumerate(_objects(file), 1):
            where = f"{file.name}, number {number}"
            if not isinstance(found, Mapping):
                raise ValueError(f"{where} is {found!r:.60}, not an object.")
            body = found["response"].get("body") if isinstance(found.get("response"), Mapping) else found
            if found.get("error") or not isinstance(body, Mapping) or "error" in body:
                raise ValueError(f"{where} is an error of the server: {found.get('error') or body!r:.200}.")
            yield from _of_object(body, where, top_k, compression)


def _objects(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise ValueError(f"no file {file}; give the files of answers, .jsonl, .json or .parquet.")
    if file.suffix == ".parquet":
        from datasets import Dataset

        yield from Dataset.from_parquet(str(file))
        return
    with file.open(encoding="utf-8") as lines:
        try:
            if file.suffix == ".json":
                whole = json.load(lines)
                yield from whole if isinstance(whole, list) else [whole]
            else:
                yield from (json.loads(line) for line in lines if line.strip())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); answers are .jsonl, .json or .parquet.") from error


def _of_object(body: Mapping, where: str, top_k: int | None, compression: Compression | None) -> Iterator[Answer]:
    choices = body.get("choices")
    if isinstance(choices, list) and body.get("prompt_logprobs") is None:
        for choice in sorted(choices, key=lambda choice: choice.get("index", 0)):
            of_choice = where if len(choices) == 1 else f"{where}, choice {choice.get('index')}"
            ids = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
            yield _of_server(choice.get("prompt_logprobs"), ids, of_choice, top_k)
    elif body.get("prompt_logprobs") is not None:
        yield _of_server(body["prompt_logprobs"], body.get("prompt_token_ids"), where, top_k)
    elif all(body.get(name) is not None for name in COLUMNS):
        yield _of_columns(*(body[name] for name in COLUMNS), where, top_k)
    elif compression is not None and all(body.get(name) is not None for name in ("input_ids", *COMPRESSED)):
        indices, values = compression.read(*(body[name] for name in COMPRESSED), where)
        yield _of_columns(body["input_ids"], indices.tolist(), values.tolist(), where, top_k)
    elif compressed := [name for name in (*COMPRESSED, *LEGACY) if name in body]:
        fix = (
            "give the settings that they were packed with, import_published(…, compression={d: …, k: …, …})"
            if compressed[0] in COMPRESSED and compression is None
            else f"its earlier format is not read: decompress them there, and write {', '.join(COLUMNS)}"
        )
        raise ValueError(f"{where} holds {', '.join(compressed)}, DistillKit's compressed logits; {fix}.")
    else:
        raise ValueError(
            f"{where} holds {', '.join(body)}; expected prompt_logprobs (a server's answer) or {', '.join(COLUMNS)}."
        )


def _of_server(logprobs: Any, ids: list[int] | None, where: str, top_k: int | None) -> Answer:
    if not isinstance(logprobs, list) or not logprobs or logprobs[0] is not None or None in logprobs[1:]:
        raise ValueError(
            f"{where} has no prompt_logprobs of a whole text (a list: null, then a mapping for every token); ask for "
            "prompt_logprobs=k, without a prefix that the server has cached."
        )
    places = [_ranked(place, f"{where}, position {number}") for number, place in enumerate(logprobs[1:], 1)]
    k = top_k or min((len(kept) for kept, _ in places), default=0)
    for place, (kept, _) in enumerate(places, 1):
        if len(kept) < max(k, 1):
            raise ValueError(
                f"{where}, position {place}, holds the {len(kept)} likeliest tokens, and top_k={k} were asked for; ask "
                "the server for more (prompt_logprobs), or keep fewer."
            )
    # the text's own token comes to the likeliest where it is none of them
    given = [[token for token, _ in own or kept] for kept, own in places] if ids is None else None
    indices = torch.tensor([[token for token, _ in kept[:k]] for kept, _ in places], dtype=torch.long)
    values = torch.tensor([[value for _, value in kept[:k]] for kept, _ in places], dtype=torch.float64)
    indices, values = indices.view(len(places), k), values.view(len(places), k)
    return Answer(where, len(logprobs), ids, indices, _checked(values, indices, where), given)


def _ranked(place: Mapping[str, Mapping], where: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(token, log-probability) of the likeliest, as far as the ranks 1, 2, 3 … go, and of what comes beside them."""
    if not isinstance(place, Mapping) or not all(
        str(token).isdecimal() and isinstance(entry, Mapping) and isinstance(entry.get("logprob"), int | float)
        for token, entry in place.items()
    ):
        raise ValueError(f"{where}, holds {place!r:.80}, expected a mapping of token id to {{logprob: …, rank: …}}.")
    entries = [(int(token), float(entry["logprob"]), entry.get("rank")) for token, entry in place.items()]
    if any(rank is None for *_, rank in entries):
        return sorted(((token, value) for token, value, _ in entries), key=lambda entry: -entry[1]), []
    by_rank: dict[int, tuple[int, float]] = {}
    beside = []
    for token, value, rank in entries:
        if rank in by_rank:  # equally likely
            beside.append((token, value))
        else:
            by_rank[rank] = (token, value)
    last = next(rank for rank in range(1, len(by_rank) + 2) if rank not in by_rank)
    beside += [entry for rank, entry in by_rank.items() if rank > last]
    return [by_rank[rank] for rank in range(1, last)], beside


def _of_columns(ids: Sequence[int], indices: Any, values: Any, where: str, top_k: int | None) -> Answer:
    ids = [int(token) for token in ids]
    try:
        indices, values = torch.tensor(indices, dtype=torch.long), torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: top_ids and top_logprobs are lists of k numbers a token ({error}).") from error
    if indices.dim() != 2 or indices.shape != values.shape or len(indices) not in (len(ids), len(ids) - 1):
        raise ValueError(
            f"{where} has {len(ids)} input_ids, top_ids {tuple(indices.shape)} and top_logprobs {tuple(values.shape)}; "
            "expected (n, k) or (n - 1, k) of both."
        )
    indices, values = indices[: len(ids) - 1], values[: len(ids) - 1]
    k = top_k or indices.shape[1]
    if k > indices.shape[1]:
        raise ValueError(f"{where} holds {indices.shape[1]} of each distribution, and top_k={k} were asked for.")
    values, order = values.topk(k)
    indices = indices.gather(-1, order)
    return Answer(where, len(ids), ids, indices, _checked(values, indices, where))


def _checked(values: Tensor, indices: Tensor, where: str) -> Tensor:
    """Log-probabilities (n - 1, k) in float64, with a number for those of 0."""
    values = values.clamp_min(IMPOSSIBLE)
    twice = (indices.sort(-1).values.diff(dim=-1) == 0).any(-1)
    wrong = values.isnan().any(-1) | (values.exp().sum(-1) > 1.01) | twice
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}, position {place + 1}: {[round(x, 3) for x in values[place, :4].tolist()]} … of tokens "
            f"{indices[place, :4].long().tolist()} … are no natural log-probabilities of different tokens (they sum to "
            f"{values[place].exp().sum():.3g}); logits and other bases are not read."
        )
    return values
