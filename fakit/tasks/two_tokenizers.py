"""The same texts in the tokens of two tokenizers: the student's, and beside them a teacher's of its own.

Each side encodes a row by its own rules (chat template, special tokens, `max_length`); a row that one of them leaves
out is left out. Two maps say which of the teacher's tokens stands for each of the student's:

* "order": the token before the k-th labeled one of an answer, and the teacher's before its k-th (ULD, Boizard et al.
  2024, arXiv 2402.12030). What the two have read there differs, as far as their tokens do.
* "text": the token behind which the teacher has read the same of the same answer (`fakit.tasks.progress`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fakit.models.tables import TEACHER_BATCH
from fakit.tasks.progress import NOWHERE
from fakit.tasks.task import IGNORED, Collator, TextTask, say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MAPS = ("order", "text")
COLUMNS = ("teacher_input_ids", "teacher_labels", *(f"same_{how}" for how in MAPS))
"""What `encode_both` adds to a row of the student's."""


def differ(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True where two tokenizers do not make the same tokens of the same texts."""
    if one.get_vocab() != other.get_vocab():
        return True
    probe = "Distillation aligns 3 layers;  naïve students don't. ☺\n"
    return one(probe)["input_ids"] != other(probe)["input_ids"]


def check_both(task: TextTask, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Raise ValueError for a task whose rows cannot be read by two tokenizers."""
    if task.kind != "causal-lm":
        found = f"a {task.kind} task, whose outputs are not of tokens: give the student the teacher's tokenizer"
    elif task.packing:
        found = "packed, and two tokenizers would pack other rows together: leave options.packing out"
    elif "turns" in task.train.column_names and task.tokens != "completion":
        found = f"with labels on {task.tokens} tokens, and prompts are written by two templates: set tokens: completion"
    elif slow := [type(one).__name__ for one in tokenizers if not one.is_fast]:
        found = f"read by {slow[0]}, which does not say which characters its tokens stand for: load the fast tokenizer"
    else:
        return
    raise ValueError(f"teacher and student have tokenizers of their own, and {task.name} is {found}.")


def encode_both(
    task: TextTask,
    data: str | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
) -> Dataset:
    """A split, or rows of a task, in the tokens of both.

    Returns:
        `task.encode(data, tokenizer, max_length)`'s columns, and of the teacher's row teacher_input_ids (T') and
        teacher_labels; same_order and same_text (T,): the teacher's token that stands for each of the student's, -1
        where none does.

    Raises:
        ValueError: what cannot be read by two tokenizers, and what `task.encode` refuses.
    """
    from datasets import Dataset

    check_both(task, (tokenizer, teacher_tokenizer))
    sides = ((task, tokenizer), (apart(task), teacher_tokenizer))
    ours, theirs = (of.encode(data, untrimmed(one), max_length, read=True).to_list() for of, one in sides)
    by_row = {row["row"]: row for row in theirs}
    rows = [_beside(row, by_row[row["row"]]) for row in ours if row["row"] in by_row]
    if not rows:
        raise ValueError(
            f"{task.name}: no row fits into max_length={max_length} in the tokens of both tokenizers; give a larger "
            "one."
        )
    labeled = sum(label != IGNORED for row in rows for label in row["labels"])
    same = sum(
        place != NOWHERE and label != IGNORED
        for row in rows
        for place, label in zip(row["same_text"], row["labels"][1:], strict=False)
    )
    what = f"{task.name}, {data}" if isinstance(data, str) else task.name
    say(
        f"{what}: {len(rows):,} of {len(ours):,} rows fit in the tokens of both tokenizers; before {same:,} of "
        f"{labeled:,} labeled tokens the teacher has read the same of the answer."
    )
    return Dataset.from_list(rows)


def apart(task: TextTask) -> TextTask:
    """The task, to be encoded in a teacher's tokens: what is cut of its texts there is not cut of the student's."""
    return dataclasses.replace(task, cut={})


def _beside(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    row = {name: values for name, values in ours.items() if name not in ("row", "read")}
    found = {
        "order": (_in_order(ours["labels"]), _in_order(theirs["labels"])),
        "text": (ours["read"], theirs["read"]),
    }
    maps = {}
    for how, (of_ours, of_theirs) in found.items():
        places = {key: place for place, key in enumerate(of_theirs) if key != NOWHERE}
        maps[f"same_{how}"] = [places.get(key, NOWHERE) for key in of_ours]
    return row | {"teacher_input_ids": theirs["input_ids"], "teacher_labels": theirs["labels"]} | maps


def _in_order(labels: list[int]) -> list[int]:
    """A key for each token before a labeled one: which of the row's labeled stretches, the last one 0, and which of its
    tokens. Stretches are counted from the end, since it is the first that a cut leaves out.
    """
    keys, stretch, number = [NOWHERE] * len(labels), 0, 0
    starts = sum(
        label != IGNORED and (place == 0 or labels[place - 1] == IGNORED) for place, label in enumerate(labels)
    )
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        begins = place == 0 or labels[place - 1] == IGNORED
        stretch, number = (stretch + 1, 0) if begins else (stretch, number + 1)
        if place:  # nothing predicts the first token of all
            keys[place - 1] = ((starts - stretch) << 32) + number
    return keys


def untrimmed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it, whose tokens count the white space that is theirs among their characters."""
    from tokenizers import Tokenizer

    given = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    written = json.dumps(given)
    if '"trim_offsets": true' not in written:
        return tokenizer
    bare = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    bare |= {"pre_tokenizer": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    bare["post_processor"] = json.loads(written.replace('"trim_offsets": true', '"trim_offsets": false'))
    found = copy.deepcopy(tokenizer)
    found.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(bare)).post_processor
    return found


# -- the tokens that both have ----------------------------------------------------------------------------------------


def shared_tokens(tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that both vocabularies have: those that stand for the same bytes of text (a space in front of a word
    among them), special tokens of one name, and the two ends of a sequence. int64 (n, 2), ids of the student and of
    the teacher; each id once.
    """
    ours, theirs = (_by_surface(one) for one in (tokenizer, teacher_tokenizer))
    pairs = [(ours[surface], theirs[surface]) for surface in ours if surface in theirs]
    return torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)


END = ("end", b"")


def _by_surface(tokenizer: PreTrainedTokenizerBase) -> dict[tuple[str, bytes], int]:
    """The id of each token by what it stands for."""
    special = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    text_of, found = _surface(tokenizer), {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number == tokenizer.eos_token_id:
            surface = END
        elif number in special or number in tokenizer.all_special_ids:
            surface = ("special", token.encode())
        elif number in tokenizer.added_tokens_decoder:
            surface = ("text", token.encode())
        else:
            surface = ("text", text_of(token))
        found.setdefault(surface, number)
    return found


def _surface(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """From a vocabulary's entry to the bytes of text that it stands for, by how the tokenizer decodes."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if '"ByteLevel"' in decoder:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        bytes_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}  # GPT-2's table
        return lambda token: b"".join(bytes_of.get(character, character.encode()) for character in token)
    if '"WordPiece"' in decoder:
        prefix = json.loads(decoder)["prefix"]

        def of_piece(token: str) -> bytes:
            if token.startswith(prefix):
                return token.removeprefix(prefix).encode()
            return (f" {token}" if token[:1].isalnum() else token).encode()  # a word begins behind a space

        return of_piece
    if '"Metaspace"' in decoder or "\\u2581" in decoder:

        def of_sentence(token: str) -> bytes:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

        return of_sentence
    return str.encode


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BothCollator:
    """Batches of `encode_both`'s rows: the student's as ever, and under "teacher_batch" the teacher's: input_ids,
    attention_mask and labels (B, T'); same_order and same_text (B, T), places in it; shared_tokens (n, 2).

    Attributes:
        student, teacher: pad the rows of each side.
        shared: `shared_tokens` of the two tokenizers.
    """

    student: Callable
    teacher: Collator
    shared: Tensor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.student([{k: x for k, x in row.items() if k not in COLUMNS} for row in examples])
        if "teacher_input_ids" not in examples[0]:  # of evaluation
            return batch
        rows = [
            {
                "input_ids": row["teacher_input_ids"],
                "attention_mask": [1] * len(row["teacher_input_ids"]),
                "labels": row["teacher_labels"],
            }
            for row in examples
        ]
        theirs = self.teacher(rows)
        widths = batch["input_ids"].shape[1], theirs["input_ids"].shape[1]
        for how in MAPS:
            theirs[f"same_{how}"] = torch.tensor([self._padded(row, f"same_{how}", *widths) for row in examples])
        return batch | {TEACHER_BATCH: theirs | {"shared_tokens": self.shared}}

    def _padded(self, row: dict[str, Any], name: str, width: int, teacher_width: int) -> list[int]:
        """Places in the padded batch of the teacher, for each token of the student's."""
        ours, theirs = width - len(row[name]), teacher_width - len(row["teacher_input_ids"])
        left = theirs if self.teacher.padding_side == "left" else 0
        places = [place + left if place != NOWHERE else NOWHERE for place in row[name]]
        padding = [NOWHERE] * ours
        return padding + places if getattr(self.student, "padding_side", "right") == "left" else places + padding


def both_collator(
    task: TextTask, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> BothCollator:
    """The collator of a task's rows in the tokens of both."""
    return BothCollator(
        task.collator(tokenizer), task.collator(teacher_tokenizer), shared_tokens(tokenizer, teacher_tokenizer)
    )
