"""A rule of the doctor, and what it may say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fakit.experiments.doctor.recorded import Recorded


@dataclass(frozen=True)
class Seen:
    """What a rule saw, in numbers, and of which arms of a task."""

    task: str
    arms: tuple[str, ...]
    numbers: str


@dataclass(frozen=True)
class Lacking:
    """What a rule needs and so many runs do not record, as a phrase that follows "the record lacks"."""

    what: str
    runs: int


@dataclass(frozen=True)
class Rule:
    """When the doctor speaks, why then, and what it says.

    Attributes:
        name: in tables. status: "error" (no result), "warning" (a likely fault) or "note" (a limit of what is claimed).
        bound: when the rule speaks. why: why this bound, with its source where there is one.
        means: what it means. fix: what to try.
        look: goes through recorded runs.
    """

    name: str
    status: str
    bound: str
    why: str
    means: str
    fix: str
    look: Callable[[Recorded], Iterable[Seen | Lacking]]


@dataclass(frozen=True)
class Finding:
    """What a rule found: of which task and arms, what was seen (numbers), what it means, what to try."""

    rule: str
    status: str
    task: str
    arms: tuple[str, ...]
    seen: str
    means: str
    fix: str
