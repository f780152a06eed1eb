"""Plain texts for a language model: every token has a label once, long texts become several rows.

A text begins with what the tokenizer puts before one (BOS) and ends with its end (EOS). One that is longer than
`max_length` becomes pieces: each begins as a text does, then with the last token of the piece before, which is context
alone, so no label is lost, and none is counted twice. `too_long`: "pieces", or "refuse" raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fakit.tasks.instructions import IGNORED, shown
from fakit.tasks.progress import laid_out, progress
from fakit.tasks.special_tokens import added_tokens, with_end, without_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class SeenTexts:
    """What became of the texts of a split: numbers, and the first two rows as the model sees them."""

    read: int = 0
    long: int = 0
    pieces: int = 0
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    shown: list[str] = field(default_factory=list)

    def said(self, what: str, max_length: int) -> str:
        """Lines for the log."""
        long = f", {self.long:,} of them in {self.pieces:,} pieces of at most {max_length} tokens" if self.long else ""
        rows = "".join(f"\n  row {number}: {row}" for number, row in enumerate(self.shown, 1))
        return (
            f"{what}: {self.read:,} texts read, all kept{long}; {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.labels:,} of them with labels. As the model sees them, labels in ⟦ ⟧:{rows}"
        )


def encode_prose(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: str,
    seen: SeenTexts,
    read: bool = False,
) -> dict[str, list]:
    """Tokens, mask and labels of rows that have a text; `seen` is counted on. With `read`, the number of each row, too,
    and what is read behind each of its tokens (`fakit.tasks.progress`); a text is then one row.

    Raises:
        ValueError: a max_length that leaves no room, or a text that is too long where that is refused.
    """
    begin, end = added_tokens(tokenizer)
    end = end or [tokenizer.eos_token_id]
    if max_length < len(begin) + 2:
        raise ValueError(f"max_length={max_length} was requested; a row takes {len(begin) + 2} or more.")
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    found = tokenizer(rows["text"], add_special_tokens=False, verbose=False, return_offsets_mapping=read)
    if read:
        encoded |= {"row": [], "read": []}
    for number, (written, ids) in enumerate(zip(rows["text"], found.input_ids, strict=True)):
        seen.read += 1
        text, start, before = with_end(without_begin(ids, begin), end), 0, seen.rows
        if read:
            keys, spelled = (
                progress(found.offset_mapping[number], 0, len(written)),
                len(ids) - len(without_begin(ids, begin)),
            )
            encoded["row"].append(seen.read - 1)
            encoded["read"].append(laid_out(keys, len(begin) - spelled, len(begin + text)))
        if (read or too_long == "refuse") and len(begin) + len(text) > max_length:
            pieces = (
                "or shorter texts: two tokenizers would cut it at different places" if read else "or too_long='pieces'"
            )
            raise ValueError(
                f"text {seen.read} ({written!r:.60}) has {len(begin) + len(text)} tokens, and max_length={max_length}; "
                f"give a larger one, {pieces}."
            )
        while start < len(text):
            given = begin + text[start - 1 : start]  # nothing precedes the first token of a text
            new = text[start : start + max_length - len(given)]
            encoded["input_ids"].append(given + new)
            encoded["attention_mask"].append([1] * len(given + new))
            encoded["labels"].append([IGNORED] * len(given) + new)
            start += len(new)
            seen.rows, seen.tokens = seen.rows + 1, seen.tokens + len(given + new)
            seen.labels += len(new) - (not given)  # nothing predicts the first token of all
            if len(seen.shown) < 2:
                learned = [place >= max(1, len(given)) for place in range(len(given + new))]
                seen.shown.append(shown(given + new, learned, tokenizer))
        if seen.rows - before > 1:
            seen.long, seen.pieces = seen.long + 1, seen.pieces + seen.rows - before
    return encoded
