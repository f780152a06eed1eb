"""What every notebook's exercises and predictions share: numbers that a room calls them by,
and a guess kept before the answer.
"""

import nbformat
import pytest

from fakit.teaching import Exercise
from tests.notebooks.cells import NOTEBOOKS, checks

FILES = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def code(path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@each
def test_exercises_are_numbered_in_their_order(path):
    numbers = [it.number for it in vars(checks(path.stem)).values() if isinstance(it, Exercise)]
    assert numbers and numbers == [f"{path.stem[:2]}.{place}" for place in range(1, len(numbers) + 1)]


@each
def test_a_prediction_is_recorded_before_it_is_revealed(path):
    sources = code(path)
    asked, kept, told = (
        next(place for place, source in enumerate(sources) if word in source)
        for word in ("guess = predict(", "my_guess = ...", ".reveal(")
    )
    assert asked <= kept < told and "mine=my_guess" in sources[told]
