"""How far an answer has been read behind each token of a row: what the tokens of two tokenizers are aligned by.

A tokenizer says which characters each of its tokens stands for. Behind a token the answer is read up to a character
where the token ends there and the next one begins there or later; a character of several tokens (an emoji of four
bytes) is read behind the last of them. Before an answer nothing of it is read, behind its last token all of it is,
whatever a chat template writes around it.
"""

from __future__ import annotations

from collections.abc import Sequence

NOWHERE = -1
WHOLE = 2**32 - 1
"""Characters of an answer that has been read to its end, whatever white space a template took from it."""


def progress(offsets: Sequence[tuple[int, int]], first: int, last: int, answer: int = 0, skipped: int = 0) -> list[int]:
    """A key for each place between the tokens of a text: place i is behind i tokens, before the others.

    Equal keys of two tokenizers say that both have read the same of the same answer; NOWHERE says nothing.

    Args:
        offsets: first character and the one behind the last, of n tokens.
        first, last: where in the text the answer stands.
        answer: its number among the answers of the row.
        skipped: white space at the front of the answer that this text leaves out.

    Returns:
        n + 1 keys.

    >>> [key if key < WHOLE else "whole" for key in progress([(0, 2), (2, 5), (5, 8), (8, 9)], 2, 8)]
    [-1, 0, 3, 'whole', -1]
    """
    keys = [NOWHERE] * (len(offsets) + 1)
    begun, read = [], 0  # places before which nothing of the answer is read
    inside = sum(start < last for start, _ in offsets)
    for place in range(len(offsets) + 1):
        read = max(read, offsets[place - 1][1]) if place else 0
        following = offsets[place][0] if place < len(offsets) else last
        if following < read or place > inside:  # within a character, or behind the answer
            continue
        if read <= first <= following and place < inside:
            begun.append(place)
        elif place == inside and first < read <= last:
            keys[place] = WHOLE
        elif first < read < last:
            keys[place] = read - first + skipped
    if begun:
        keys[begun[-1]] = 0
    last_of = {key: place for place, key in enumerate(keys)}
    return [
        NOWHERE if key == NOWHERE or last_of[key] != place else (answer << 32) + key for place, key in enumerate(keys)
    ]


def laid_out(keys: Sequence[int], before: int, tokens: int) -> list[int]:
    """Keys of the places between tokens as keys of what is read behind each token of a row of so many `tokens`, in
    which `before` others stand in front. What the row does not hold is left out.
    """
    found = [NOWHERE] * tokens
    for token, key in enumerate(keys, before - 1):
        if key != NOWHERE and 0 <= token < tokens:
            found[token] = key
    return found


def answer_of(key: int) -> int:
    """The number of the answer that a key is of."""
    return key >> 32
