"""A number that changes while a student trains: a weight, a temperature or a loss's own parameter, by optimizer step.

transformers' schedulers multiply a learning rate and live in an optimizer; here a value goes from one number to another
and is a function of the step alone, so that a resumed run continues it to the last bit and a figure can draw it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NoReturn, Self, get_args

Kind = Literal["linear", "cosine", "warmup", "steps", "constant"]
KINDS: tuple[str, ...] = get_args(Kind)
Step = int | float  # optimizer steps done, or, between 0 and 1, a share of all steps
_IN_A_FILE = {"start_value": "from", "end_value": "to"}  # the other fields have one name everywhere


@dataclass(frozen=True)
class Schedule:
    """From one value to another; x = (step - start) / (end - start), held between 0 and 1, is how far it has come.

    | kind | share of the way | |
    |---|---|---|
    | linear | x | |
    | cosine | (1 - cos πx) / 2 | slow at both ends |
    | warmup | x | rises to `end_value` by a given `end` |
    | steps | milestones passed / milestones | equal jumps; the new value holds from the milestone on |
    | constant | 0 | `start_value` always, so that a study may vary the kind alone |

    Args:
        start_value: up to the step `start`; finite, at least 0.
        end_value: from the step `end` on.
        kind: see the table.
        start, end: optimizer steps done, or a share of training (0.5: half of its steps); `end=None` is its end.
        milestones: of "steps" alone, which has neither start nor end; likewise steps or shares.

    Raises:
        ValueError: an unknown kind, a value that is negative or not finite, an end that does not lie after the start,
            milestones out of order, or what the kind does not take.

    >>> schedule = Schedule(1.0, 0.1, "cosine", start=0, end=500)
    >>> [round(schedule.at(step), 3) for step in (0, 250, 500, 900)]
    [1.0, 0.55, 0.1, 0.1]
    >>> [Schedule(1.0, 0.0, "steps", milestones=(0.5,)).at(step, 60) for step in (0, 29, 30)]
    [1.0, 1.0, 0.0]
    >>> print(Schedule(0.0, 1.0, "steps", milestones=(100, 200)))
    steps 0 → 1 at 100, 200
    """

    start_value: float
    end_value: float
    kind: Kind = "linear"
    start: Step = 0
    end: Step | None = None
    milestones: tuple[Step, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            self._refuse(f"kind {self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        for name in ("start_value", "end_value"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
                self._refuse(f"{name} is {value!r}, expected a finite number of at least 0")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        given = [step for step in (self.start, self.end, *self.milestones) if step is not None]
        if wrong := [step for step in given if not _is_step(step)]:
            self._refuse(
                f"found {wrong[0]!r} for a step; steps are whole numbers from 0 on, or shares of training between 0 "
                "and 1"
            )
        self._check_kind()

    def _check_kind(self) -> None:
        if self.kind == "steps":
            if (self.start, self.end) != (0, None):
                self._refuse("steps are taken at milestones; leave out start and end")
            if len({type(place) for place in self.milestones}) > 1:
                self._refuse(f"found milestones {list(self.milestones)}; give steps alone, or shares alone")
            if not self.milestones or list(self.milestones) != sorted(set(self.milestones)):
                self._refuse(f"found milestones {list(self.milestones)}, expected one or more, each after the last")
            return
        if self.milestones:
            self._refuse(f"milestones are for kind='steps'; {self.kind} has start and end")
        if self.end is not None and type(self.end) is type(self.start) and self.end <= self.start:
            self._refuse(f"it ends at step {self.end} and starts at {self.start}; give an end after the start")
        if self.kind == "warmup" and (self.end is None or self.end_value <= self.start_value):
            self._refuse("a warm-up rises, and its end is given; 'linear' goes anywhere, until the end of training")

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"Schedule({self.start_value!r}, {self.end_value!r}, {self.kind!r}): {why}.")

    def at(self, step: int, steps: int | None = None) -> float:
        """The value when `step` optimizer steps are done.

        Args:
            steps: of the whole training; only a schedule without an `end` asks for it.

        Raises:
            ValueError: see `until`.
        """
        if self.kind == "steps":
            done = sum(self._passed(place, step, steps) for place in self.milestones) / len(self.milestones)
        elif self.kind == "constant" or step == 0 or step <= self._whole(self.start, steps):
            done = 0.0
        else:
            start = self._whole(self.start, steps)
            done = min(1.0, (step - start) / (self.until(steps) - start))
            done = (1 - math.cos(math.pi * done)) / 2 if self.kind == "cosine" else done
        return (1 - done) * self.start_value + done * self.end_value  # exact at both ends

    def until(self, steps: int | None) -> int:
        """The step from which on it stays as it is, in a training of so many steps.

        Raises:
            ValueError: it goes to the end of training, or by shares of it, and nobody says how long that is; or it ends
                where it starts.
        """
        if self.kind == "constant":
            return 0
        if self.kind == "steps":
            whole = [self._whole(place, steps) for place in self.milestones]
            if whole != sorted(set(whole)):
                self._refuse(f"its milestones {list(self.milestones)} fall on the steps {whole} of {steps}; move them")
            return whole[-1]
        start = self._whole(self.start, steps)
        if self.end is not None:
            end = self._whole(self.end, steps)
            if end <= start:
                self._refuse(f"of {steps} steps, it starts at {start} and ends at {end}; give an end after the start")
            return end
        if steps is None:
            self._refuse(
                "it goes on until the end of training, and how many steps that is was not said; give it an end, or "
                "call objective.set_step(step, of=steps), as DistillationTrainer does"
            )
        if steps <= start:
            self._refuse(f"it starts at step {start}, and training ends at step {steps}; start it earlier")
        return steps

    def _whole(self, place: Step, steps: int | None) -> int:
        """A place as a number of steps, a share of training rounded to the next."""
        if isinstance(place, int):
            return place
        if steps is None:
            self._refuse(
                f"{place:g} is a share of training, and how many steps that has was not said; give whole steps, or "
                "call objective.set_step(step, of=steps), as DistillationTrainer does"
            )
        return math.floor(place * steps + 0.5)

    def _passed(self, place: Step, step: int, steps: int | None) -> bool:
        """Whether it is reached at a step. At step 0 no share of any training is, so nothing need be known of it."""
        return (step > 0 or isinstance(place, int)) and step >= self._whole(place, steps)

    @property
    def highest(self) -> float:
        """Of all its values."""
        return self.start_value if self.kind == "constant" else max(self.start_value, self.end_value)

    @property
    def lowest(self) -> float:
        """Of all its values."""
        return self.start_value if self.kind == "constant" else min(self.start_value, self.end_value)

    def to_dict(self) -> dict[str, Any]:
        """As a file has it: `from`, `to`, `kind`, and what else was given. `from_dict` gives back an equal one."""
        given = {_IN_A_FILE.get(name, name): value for name, value in vars(self).items()}
        unset = {"start": 0, "end": None, "milestones": ()}
        found = {name: value for name, value in given.items() if name not in unset or value != unset[name]}
        return {name: list(value) if name == "milestones" else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Of a mapping with the keys of a file.

        Raises:
            ValueError: a key that it does not have, no `from` or `to`, or what the class refuses.
        """
        names = {_IN_A_FILE.get(name, name): name for name in cls.__dataclass_fields__}
        lacking, unknown = (
            [key for key in _IN_A_FILE.values() if key not in given],
            [k for k in given if k not in names],
        )
        if lacking or unknown:
            found = (
                f"unknown key {unknown[0]!r}" if unknown else f"no {lacking[0]!r} among {', '.join(map(str, given))}"
            )
            raise ValueError(f"a schedule has the keys {', '.join(names)}; found {found}.")
        return cls(**{names[key]: value for key, value in given.items()})

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"constant {self.start_value:g}"
        where = (
            f"at {', '.join(map(str, self.milestones))}"
            if self.kind == "steps"
            else f"from step {self.start} to {'the end' if self.end is None else self.end}"
        )
        return f"{self.kind} {self.start_value:g} → {self.end_value:g} {where}"


def _is_step(value: object) -> bool:
    if isinstance(value, float):
        return 0 < value < 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def from_file(value: Any) -> Any:
    """A setting of a configuration, where a mapping with `from` and `to` stands for a schedule."""
    return Schedule.from_dict(value) if isinstance(value, Mapping) and {"from", "to"} <= value.keys() else value


def scheduled(value: Any) -> bool:
    """Whether a setting is a schedule, or a dictionary with one in it (a loss's own parameters)."""
    return isinstance(value, Schedule) or (isinstance(value, dict) and any(map(scheduled, value.values())))


def at_step(value: Any, step: int, steps: int | None = None) -> Any:
    """A setting as it is at a step: of a schedule its number, in a dictionary of each."""
    if isinstance(value, Schedule):
        return value.at(step, steps)
    return {name: at_step(of, step, steps) for name, of in value.items()} if isinstance(value, dict) else value


def all_off(weights: Mapping[str, float | Schedule], steps: int | None, first: int = 0) -> int | None:
    """The first step from `first` on in which every weight is 0; None where there is none in a training of so many.

    A schedule goes one way only: weights that are 0 together are so at first, or once the last of them has ended.
    """
    schedules = [weight for weight in weights.values() if isinstance(weight, Schedule)]
    ends = [] if steps is None else [schedule.until(steps) for schedule in schedules]
    turns = [step for step in sorted({first, *ends}) if first <= step and (steps is None or step < steps)]
    return next((step for step in turns if not any(at_step(dict(weights), step, steps).values())), None)
