"""Sentences of a notebook whose numbers are computed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any


class _Listed(str):
    """Names as prose lists them."""

    def __new__(cls, names: Iterable[Any]) -> _Listed:
        *rest, last = [str(name) for name in names] or ["none"]
        return super().__new__(cls, f"{', '.join(rest)} and {last}" if rest else last)


def say(template: str, **values: Any) -> None:
    """Show a sentence in markdown with numbers put into it, as `str.format` does.

    A list or a tuple of names is written as prose lists it: "a, b and c", or "none" where it is empty.

    Args:
        template: markdown; its indentation goes, so that it may be a text of several lines.
        values: for the braces.

    Raises:
        KeyError: a brace without a value.

    >>> say("{names} gain **{gain:+.1f}** points.", names=["features", "attention"], gain=1.25)
    features and attention gain **+1.2** points.
    """
    from IPython.display import display

    shown = {
        name: _Listed(value) if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) else value
        for name, value in values.items()
    }
    display(_Said(textwrap.dedent(template).strip().format(**shown)))


class _Said:
    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text
