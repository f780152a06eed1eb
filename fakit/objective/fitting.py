"""What an objective learns from traces before training: the teacher's statistics, and the best linear projections."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fakit.objective.features import Features
from fakit.objective.projections import LeastSquares
from fakit.objective.standardization import Moments, Standardization
from fakit.tracing.trace import Trace


def fit_standardization(
    terms: Sequence[Features],
    modules: nn.ModuleDict,
    teachers: Iterable[Trace],
    gather: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """See `Objective.fit_standardization`; `modules` are the objective's own."""
    names = {name for term in terms for name in term.standardizations()}
    if not names:
        raise ValueError("no term of this objective standardizes the teacher: Features(…, standardize='phi_s').")
    moments: dict[str, Moments] = {}
    for teacher in teachers:
        done: set[str] = set()
        for term in terms:
            term.add_moments(teacher, moments, done)
    if missing := sorted(names - moments.keys()):
        raise ValueError(
            f"the traces hold nothing for {', '.join(missing)}: capture what the objective needs of the teacher, "
            "in one trace at least (of a random layer map every layer that it may draw)."
        )
    device = next((buffer.device for buffer in modules.buffers()), None)
    for term in terms:
        term.make_standardizations({name: len(found.mean) for name, found in moments.items()})
    for name, found in moments.items():
        found = found if gather is None else found.gathered(gather)
        cast(Standardization, modules[name].to(device)).set(found)


def fit_projections(
    terms: Sequence[Features], students: Iterable[Trace], teachers: Iterable[Trace]
) -> dict[str, float]:
    """See `Objective.fit_projections`."""
    sums: dict[str, LeastSquares] = {}
    with torch.no_grad():
        for student, teacher in zip(students, teachers, strict=True):
            for term in terms:
                for pair in term.shares():
                    term.gather(student, teacher, pair, sums)
    if not sums:
        raise ValueError(
            "this objective has no projections to fit for these traces: widths agree, or no term needs them equal."
        )
    return {name: found.solve() for name, found in sums.items()}
