"""Text of a notebook: markdown that draws itself, and sentences whose numbers are computed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Page:
    """Markdown that draws itself."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return re.sub(r"</?(details|summary|b|br)>", "", self.text).strip()


def listed(names: Iterable[Any], word: str = "and") -> str:
    """Names as prose lists them: "a, b and c"; "none" where there are none."""
    *rest, last = [str(name) for name in names] or ["none"]
    return f"{', '.join(rest)} {word} {last}" if rest else last


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
        name: listed(value) if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) else value
        for name, value in values.items()
    }
    display(Page(textwrap.dedent(template).strip().format(**shown)))
