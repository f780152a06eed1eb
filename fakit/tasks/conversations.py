"""Rows of instruction data as conversations: five shapes, recognized by their columns, in one form.

* {"messages"}, ShareGPT's {"conversations"}, {"prompt", "completion"} (two texts, or two lists of messages), Alpaca's
  {"instruction", "input", "output"}; {"text"} alone is plain text, and is encoded elsewhere.
* Each row becomes `turns` (role and content of every message before the last answer), `answer` (the last answer, or
  None) and `text` (the turns in plain words: rows are told apart by it). What follows the last answer is left out.
* A message's content is a text, or a list of parts that are texts, which follow each other. A column "system" is the
  system message of a row that has none. An answer of "weight" 0 is given.
* Answers that a prompt holds are given: they are context, and have no labels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# The columns that a shape must have, the surest first.
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
# Words for them in ShareGPT and in what was made like it, in small letters.
ROLES = {"human": "user", "gpt": "assistant"} | dict.fromkeys(
    ("chatgpt", "model", "bing", "bard", "ai", "bot"), "assistant"
)
NAMED = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython")
ASIDE = ("history", "tools")  # columns of known shapes that are not read
ASIDE_IN_MESSAGES = ("reasoning_content", "tool_calls")


def shape_of(columns: Collection[str]) -> str | None:
    """The shape of instruction data that has these columns."""
    return next((shape for shape, needed in SHAPES.items() if set(needed) <= set(columns)), None)


def as_turns(rows: Dataset, shape: str, where: str) -> Dataset:
    """Rows of a shape as the columns text, turns and answer (None where a row has none, or a pool no such column).

    Raises:
        ValueError: a message without role or text, a completion without an answer; names the row.
    """
    from datasets import Dataset

    tidy: dict[str, list] = {"text": [], "turns": [], "answer": []}
    aside: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            messages = _messages(row, shape)
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: {error}") from error
        aside.update(_left_out(row, shape))
        answered = [place for place, message in enumerate(messages) if _is_answer(message)]
        turns = messages[: answered[-1]] if answered else messages
        tidy["text"].append("\n".join(message["content"] for message in turns))
        tidy["turns"].append(turns)
        tidy["answer"].append(messages[answered[-1]]["content"] if answered else None)
    if aside:
        told = ", ".join(f"{name} ({count} rows)" for name, count in aside.items())
        logger.warning("%s: not read, and so not seen by the models: %s.", where, told)
    return Dataset.from_dict(tidy)


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("given") and bool(message["content"].strip())


def _left_out(row: dict[str, Any], shape: str) -> set[str]:
    """What a row has beside the parts of its shape that are read."""
    found = {name for name in ASIDE if row.get(name)}
    columns = {"completion": ("prompt", "completion"), "alpaca": ()}.get(shape, (shape,))
    listed = [row[column] for column in columns if isinstance(row.get(column), list)]
    return found | {
        name
        for messages in listed
        for message in messages
        if isinstance(message, dict)
        for name in ASIDE_IN_MESSAGES
        if message.get(name)
    }


def _messages(row: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    found = [message for message in _of_shape(row, shape) if message["role"] != "system" or message["content"].strip()]
    while found and found[-1]["role"] == "assistant" and not found[-1]["content"].strip():
        found.pop()  # an answer that is not there
    system = row.get("system")
    if isinstance(system, str) and system.strip() and found and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


def _of_shape(row: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    if shape in ("messages", "conversations"):
        return _listed(row[shape] or [], shape)
    if shape == "completion":
        if any(isinstance(row.get(column), list) for column in ("prompt", "completion")):
            return _conversational(row)
        prompt, answer = _text(row["prompt"], "prompt"), _text(row.get("completion"), "completion")
    else:
        parts = [_text(row.get(name), name) for name in ("instruction", "input")]
        prompt, answer = "\n\n".join(part for part in parts if part.strip()), _text(row.get("output"), "output")
    asked = [{"role": "user", "content": prompt}] if prompt.strip() else []
    return asked + ([{"role": "assistant", "content": answer}] if asked and answer.strip() else [])


def _conversational(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A prompt and a completion of which one or both are lists of messages."""
    prompt, completion = (
        _listed(value, column) if isinstance(value, list) else _one(_text(value, column), role)
        for column, role in (("prompt", "user"), ("completion", "assistant"))
        for value in (row.get(column),)
    )
    if completion and not any(map(_is_answer, completion)):
        raise ValueError(
            f"completion has turns of {', '.join(message['role'] for message in completion)} and none of assistant, so "
            "there is nothing to learn in it; what is given goes into prompt."
        )
    asked = [message | {"given": True} for message in prompt]
    return asked + [message | {"given": message.get("given", False)} for message in completion]


def _one(text: str, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if text.strip() else []


def _listed(found: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        raise ValueError(f"{column} holds {found!r:.60}, not a list of messages.")
    return [_message(message, place) for place, message in enumerate(found, 1)]


def _message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {place} is {message!r:.60}, not a mapping of role and content.")
    role = message.get("role") or message.get("from")
    content = message["content"] if message.get("content") is not None else message.get("value")
    if not isinstance(role, str):
        raise ValueError(f"message {place} has no role (it has {', '.join(message)}); give role and content.")
    role = ROLES.get(role.lower(), role.lower() if role.lower() in NAMED else role)
    if role not in NAMED and not message.get("role"):
        raise ValueError(
            f"message {place} is from {role!r}, and nobody knows whether that is an answer; use {', '.join(NAMED)}, or "
            f"ShareGPT's {', '.join(ROLES)}."
        )
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"message {place} ({role}) holds {content!r:.60} where its text should be; calls of tools, pictures and "
            "parts that are no text are not read."
        )
    given = {"given": True} if message.get("weight") == 0 else {}
    return {"role": role, "content": content, **given}


def _is_text_part(part: Any) -> bool:
    """{"type": "text", "text": …}; keys that parts of other kinds fill are empty."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(value: Any, column: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | dict):
        raise ValueError(f"{column} holds {value!r:.60}, not a text.")
    return str(value)
