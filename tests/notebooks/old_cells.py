"""What the tests of exercises share: an exercise as its cell defines it, what its stub holds,
what its last hint solves.
"""

from __future__ import annotations

import linecache
import re

import nbformat

from fakit.teaching import Exercise
from tests.notebooks.cells import NOTEBOOKS, assert_told, solution

__all__ = ["assert_ladder", "assert_told", "exercise", "solution", "source"]


def source(notebook: str, cell: str) -> str:
    """The source of one cell."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    return next(c.source for c in cells if c.id == cell)


def exercise(notebook: str, cell: str, known: dict) -> tuple[Exercise, dict]:
    """The exercise of a cell, and the cell's namespace; `known` is what earlier cells define."""
    namespace = dict(known)
    exec(source(notebook, cell), namespace)
    return next(value for value in namespace.values() if isinstance(value, Exercise)), namespace


def stub(notebook: str, cell: str, namespace: dict):
    """What the reader finds in the answer's cell: that cell up to its last line, which checks it."""
    names = {cell.replace("exercise", "answer"), cell.removesuffix("-check"), cell.replace("-check", "-mine")} - {cell}
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    (own,) = (c.id for c in cells if c.id in names and re.search(r"check\(\w+\)$", c.source.strip()))
    *lines, last = source(notebook, own).strip().splitlines()
    code = "\n".join(lines)
    linecache.cache[own] = (len(code), None, code.splitlines(keepends=True), own)  # as IPython does with its cells
    exec(compile(code, own, "exec"), namespace)
    return namespace[re.search(r"check\((\w+)\)", last)[1]]


def assert_ladder(notebook: str, cell: str, task: Exercise, namespace: dict) -> None:
    """The stub in the notebook is "not done yet", and the solution in the last hint passes."""
    result = task.check(stub(notebook, cell, namespace))
    assert result.status == "not done yet", result
    result = task.check(solution(task, namespace))
    assert result.status == "passes", result
