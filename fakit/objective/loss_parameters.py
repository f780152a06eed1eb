"""A loss's own parameters, which a term takes by keyword: `Outputs("jsd", beta=0.1)`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fakit.objective.schedules import scheduled
from fakit.objective.term import Term, choose

# What the objective itself gives a loss; everything else in its signature may be set by keyword.
GIVEN = ("student", "teacher", "mask", "temperature", "labels")


def checked(term: type[Term], loss: str | Callable, known: Mapping[str, Callable], parameters: Mapping) -> Callable:
    """The function of a loss, which takes these parameters.

    Args:
        term: the class that takes it.

    Raises:
        ValueError: a loss that is not known, or a parameter that is not in its signature.
    """
    function = choose(term.__name__, loss, known)
    if not parameters:
        return function
    signature = inspect.signature(function).parameters
    allowed = [name for name, p in signature.items() if name not in GIVEN and p.kind is not p.VAR_KEYWORD]
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    unknown = [name for name in parameters if name in GIVEN or (name not in allowed and not anything)]
    if unknown:
        settings = [name for name in inspect.signature(term).parameters if name not in ("parameters", "more")]
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", "the function")
        raise ValueError(
            f"{term.__name__}({name!r}, {unknown[0]}={parameters[unknown[0]]!r}): {name} has no parameter "
            f"{unknown[0]!r}; it has {', '.join(allowed) or 'none of its own'}, and {term.__name__} takes "
            f"{', '.join(settings)}."
        )
    return function


def ends(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A loss's own parameters as they are at first and at last, where one of them is a Schedule."""
    if not scheduled(parameters):
        return [dict(parameters)]
    sides = ("start_value", "end_value")
    return [{n: getattr(v, side) if scheduled(v) else v for n, v in parameters.items()} for side in sides]
