"""A check, what it finds, and the order in which checks run: none is left out in silence, and none stops the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
Number = float | int | str


class NotRun(Exception):
    """Why a check cannot run here: a package, or arithmetic, that this machine lacks."""


@dataclass(frozen=True)
class Bench:
    """Where checks run, and how large.

    Attributes:
        device: what is checked. What it is compared with is always computed by the CPU in float64.
        full: sizes of real work; else small ones, which show that it runs and is right, and no cost.
        repeats: turns of each way where seconds are measured.
    """

    device: torch.device
    full: bool = True
    repeats: int = 5

    @property
    def on_cpu(self) -> bool:
        """Float32 on the CPU stands for the other device."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Finding:
    """What a check measured.

    Attributes:
        numbers: by what they are.
        wrong: what is not as it has to be, with both numbers; empty where all is well.
    """

    numbers: Mapping[str, Number] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One thing to find out: a group for the report, a name, and a function of the bench."""

    group: str
    name: str
    run: Callable[[Bench], Finding]


@dataclass(frozen=True)
class Outcome:
    """How a check ended: `status` is "passed", "failed" or "not run", and `reason` says why it is not the first."""

    group: str
    name: str
    status: str
    reason: str
    numbers: Mapping[str, Number]
    seconds: float

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def run_all(checks: Iterable[Check], bench: Bench, minutes: float) -> Iterator[Outcome]:
    """Each check's outcome, in order. After `minutes` no further one is begun.

    Once an error has left the device unable to compute, no later check says anything about the kit: they are not run.
    """
    start, dead = time.perf_counter(), ""
    for check in checks:
        if not dead and time.perf_counter() - start > 60 * minutes:
            dead = f"the {minutes:g} minutes of this run were over (--minutes)"
        outcome = Outcome(check.group, check.name, NOT_RUN, dead, {}, 0.0) if dead else run_one(check, bench)
        yield outcome
        if outcome.status == FAILED and not _answers(bench.device):
            dead = f"the device computes no more since the check {check.name!r}; start anew, without it (--without)"


def run_one(check: Check, bench: Bench) -> Outcome:
    """Run a check; whatever it raises becomes its outcome."""
    start = time.perf_counter()
    numbers: Mapping[str, Number] = {}
    try:
        found = check.run(bench)
        numbers = found.numbers
        status, reason = (FAILED, "; ".join(found.wrong)) if found.wrong else (PASSED, "")
    except NotRun as why:
        status, reason = NOT_RUN, str(why)
    except (torch.OutOfMemoryError, MemoryError) as error:
        status, reason = NOT_RUN, f"out of memory: {_first_line(error)}"
    except Exception as error:  # a check that breaks is a finding, and the next one runs
        status, reason = FAILED, f"{type(error).__name__}: {_first_line(error)}"
    taken = time.perf_counter() - start
    if not bench.on_cpu:
        gc.collect()
        _empty_cache()
    return Outcome(check.group, check.name, status, reason, numbers, taken)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["without a message"])[0][:500]


def _empty_cache() -> None:
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # of a device that computes no more, which `run_all` asks about
        return


def _answers(device: torch.device) -> bool:
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


# -- comparing --------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖, in float64 on the CPU; ‖found‖ where the exact one is 0. NaN stays NaN."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    size = exact.norm().item()
    return (found - exact).norm().item() / (size or 1.0)


def within(errors: Mapping[str, float], bars: Mapping[str, float]) -> tuple[str, ...]:
    """What is above its bar, said with both numbers; NaN is."""
    return tuple(
        f"{name} is {error:.3g}, which had to be at most {bars[name]:g}"
        for name, error in errors.items()
        if not error <= bars[name]
    )


def hold(**claims: tuple[bool, str]) -> tuple[str, ...]:
    """What is said of the claims that are false."""
    return tuple(said for true, said in claims.values() if not true)
