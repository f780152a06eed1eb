"""What the tests of exercises share: an exercise as its cell defines it, what its stub holds, what its last hint solves."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import nbformat

from fakit.teaching import Exercise

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


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
    """What the reader finds in the answer's cell: that cell without its last line, which checks it."""
    *lines, last = source(notebook, cell.replace("exercise", "answer")).strip().splitlines()
    code = "\n".join(lines)
    linecache.cache[cell] = (len(code), None, code.splitlines(keepends=True), cell)  # as IPython does with its cells
    exec(compile(code, cell, "exec"), namespace)
    return namespace[re.search(r"check\((\w+)\)", last)[1]]


def solution(task: Exercise, namespace: dict):
    """What the last hint defines as `my_…`."""
    code = re.search(r"```python\n(.*?)```", task._hints[-1], re.DOTALL)[1]
    exec(code, namespace)
    (name,) = {
        line.split()[0 if "=" in line else 1].split("(")[0]
        for line in code.splitlines()
        if re.match(r"(def )?my_", line)
    }
    return namespace[name]
