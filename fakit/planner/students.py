"""What a plan is given as a student: layers of the teacher's, or another model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from fakit.planner.presets import recorded

Student = str | int | tuple[int, int | None] | Sequence[int] | Path | PreTrainedConfig | PreTrainedModel


def is_model(student: Student) -> bool:
    """Whether it names, or is, a model of its own: a recorded one, a folder, a hub id (owner/name)."""
    if isinstance(student, Path | PreTrainedConfig | PreTrainedModel):
        return True
    return isinstance(student, str) and ("/" in student or recorded(student) is not None or Path(student).is_dir())


def parse_student(student: Student) -> tuple[int | tuple[int, ...], int | None]:
    """(layers, width) of 4, "4", "4x1024", (4, 1024) or [1, 8, 16]; width None is the teacher's."""
    if isinstance(student, int) and not isinstance(student, bool):
        return student, None
    if isinstance(student, tuple) and len(student) == 2:
        layers, width = student
        return whole("student layers", layers), None if width is None else whole("student width", width)
    if isinstance(student, list):
        return tuple(student), None
    found = re.fullmatch(r"\s*(\d+)\s*(?:[x×]\s*(\d+)\s*)?", str(student))
    if not found:
        raise ValueError(
            f"student {student!r} is no LAYERS[xWIDTH]; write 4 for four layers of the teacher's width, or 4x1024. "
            "Another model is given by a recorded name (Llama-3.2-1B), a folder or a hub id."
        )
    return int(found[1]), int(found[2]) if found[2] else None


def whole(what: str, number: float) -> int:
    """A whole number from 1 to 10⁹, also where it came as a float or from NumPy: torch counts no larger tensors."""
    if isinstance(number, bool) or not isinstance(number, Real) or not float(number).is_integer() or number < 1:
        raise ValueError(f"{what} is {number!r}; it is a whole number above 0.")
    if number > 10**9:
        raise ValueError(f"{what} is {number:.3g}; a step has no more than 10⁹ of them.")
    return int(number)


def check_vocabularies(student: tuple[str, int], teacher: tuple[str, int]) -> None:
    """Raise ValueError where two language models, each (name, entries), have not one vocabulary: outputs are compared
    class by class, in training and when the student is evaluated.
    """
    if student[1] != teacher[1]:
        raise ValueError(
            f"outputs are compared class by class, and the vocabulary of the student {student[0]} has {student[1]:,} "
            f"entries, that of the teacher {teacher[0]} {teacher[1]:,}. Give a student of the teacher's family with as "
            "many; a head that is only padded is brought to the teacher's by resize_token_embeddings."
        )
