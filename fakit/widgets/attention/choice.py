"""A choice in the attention viewer that is not there: refused, and named beside those that are."""

from __future__ import annotations

from typing import Any

import traitlets


class Refused(ValueError, traitlets.TraitError):
    """A choice that the viewer does not have: a ValueError, as everywhere in the kit, that traitlets takes back."""


def one_of(what: str, value: Any, allowed: Any) -> Any:
    """`value`, if it is among `allowed`, a range or a collection; else `Refused`, which lists them."""
    if value not in allowed:
        choices = list(allowed)
        listed = f"{choices[0]} to {choices[-1]}" if isinstance(allowed, range) else ", ".join(map(str, choices))
        raise Refused(f"{what} = {value!r}; this viewer has {listed}")
    return value
