"""Two sides' logits as a loss takes them: one shape, nothing from padding, divided by τ, float32 or better."""

import math
from collections.abc import Callable
from inspect import signature
from numbers import Real
from typing import Any

from torch import Tensor, promote_types

from fakit.losses.kl import lowest
from fakit.losses.reduce import at_least_float32, check_labels, check_mask, masked_mean

# What a formula is given by whoever has it, where its signature names it.
GIVEN = ("labels", "temperature")
# what compares sorted probabilities, and so any two vocabularies
ANY_VOCABULARIES = ("uld",)
_FIX = (
    "Different vocabularies: pad-only differences are cut with Outputs(vocab_size=N); different tokenizers cannot be "
    "matched token by token: Outputs('uld') compares their sorted probabilities."
)


def asked_of(formula: Callable) -> tuple[str, ...]:
    """Which of "labels" (...) and "temperature" a formula or a loss names in its signature.

    >>> asked_of(lambda student, teacher, labels: None)
    ('labels',)
    """
    return tuple(name for name in GIVEN if name in signature(formula).parameters)


def mean_over_positions(
    name: str,
    formula: Callable,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    **parameters: Any,
) -> Tensor:
    """τ² times the mean over valid positions of a formula of `fakit.losses.divergences`. ()

    Args:
        name: of the loss, for messages.
        formula: (..., V) twice, divided by τ -> (...). One that names `temperature` is given it.
        student, teacher: logits (B, T, V) or (B, C).
        mask: bool (B, T) or (B,), True = counts; None counts all.
        parameters: the formula's own. `labels` (B, T) or (B,) leave out positions of -100, and the mean is 0 (with
            graph) where they leave out all.

    Raises:
        ValueError: shapes that differ, a mask or labels that do not fit, no valid position, an impossible temperature.
    """
    if "temperature" in asked_of(formula):
        parameters["temperature"] = temperature
    labels = parameters.get("labels")
    student, teacher = prepare(name, student, teacher, mask, temperature)
    if labels is None:
        return temperature**2 * masked_mean(formula(student, teacher, **parameters), mask)
    labels = labels.to(student.device)
    labeled = labeled_positions(name, labels, mask, student)
    parameters["labels"] = labels.masked_fill(~labeled, 0)
    values = formula(student, teacher, **parameters).masked_fill(~labeled, 0.0)
    return temperature**2 * values.sum() / labeled.sum().clamp_min(1)


def prepare(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Both logits divided by τ, in one dtype, 0 in padding and `lowest` in place of -inf.

    Raises:
        ValueError: as `mean_over_positions`.
    """
    shapes = [z.shape[:-1] if name in ANY_VOCABULARIES else z.shape for z in (student, teacher)]
    if shapes[0] != shapes[1] or student.dim() not in (2, 3) or teacher.dim() != student.dim():
        raise ValueError(
            f"{name} compares logits of one shape, (B, T, V) or (B, C); student has {tuple(student.shape)}, teacher "
            f"has {tuple(teacher.shape)}. {_FIX}"
        )
    check_mask(name, mask, student.shape[:-1])
    check_temperature(name, temperature)
    if mask is not None:
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    student, teacher = at_least_float32(student) / temperature, at_least_float32(teacher) / temperature
    dtype = promote_types(student.dtype, teacher.dtype)  # float64 where one side is
    student, teacher = student.to(dtype), teacher.to(dtype)
    return student.clamp_min(lowest(student.dtype)), teacher.clamp_min(lowest(teacher.dtype))


def labeled_positions(name: str, labels: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """The valid positions that carry a label. bool, the shape of `labels`

    Raises:
        ValueError: labels that are no classes, one a position, or (on the CPU, where looking costs nothing) a label
            that is neither a class nor -100.
    """
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} wants a class for every position, integers {tuple(logits.shape[:-1])}, -100 where there is none; "
            f"the labels are {kind} {tuple(labels.shape)} beside logits {tuple(logits.shape)}."
        )
    check_labels(name, labels, logits.shape[-1])
    labeled = labels != -100
    return labeled if mask is None else labeled & mask.bool()


def check_temperature(name: str, temperature: float | Tensor) -> None:
    """Raise ValueError unless the temperature is a tensor, or a finite number above 0."""
    if isinstance(temperature, Tensor):
        return
    if not isinstance(temperature, Real) or not 0 < float(temperature) < math.inf:
        raise ValueError(
            f"{name} wants a finite temperature above 0, not {temperature!r}; 1 leaves the distributions as they are."
        )


def check_vocabularies(student: int, teacher: int, vocab_size: int | None, loss: object = None) -> None:
    """Raise ValueError unless `vocab_size` entries are in both vocabularies, or, where it is None, both have one size
    or the loss compares any two.

    Args:
        student, teacher: numbers of entries of the logits.
    """
    if vocab_size is None and student != teacher and loss not in ANY_VOCABULARIES:
        raise ValueError(
            f"vocabulary sizes differ: the student's logits have {student} entries, the teacher's {teacher}. If one "
            f"head is only padded, Outputs(vocab_size={min(student, teacher)}) cuts both to the shared true "
            "vocabulary; if the tokenizers differ, outputs cannot be matched token by token, and Outputs('uld') "
            "compares their sorted probabilities."
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size={vocab_size} entries are not in both vocabularies: the student has {student}, the teacher "
            f"{teacher}."
        )
