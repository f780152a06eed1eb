"""What the tests of exercises share: a notebook's checks, what its stubs hold, what the last hints solve."""

from __future__ import annotations

import ast
import importlib.util
import linecache
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat

from fakit.teaching import Exercise

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@cache
def checks(notebook: str) -> ModuleType:
    """notebooks/checks/nbNN.py of a notebook, "04" or "04_loss_laboratory"."""
    path = NOTEBOOKS / "checks" / f"nb{notebook[:2]}.py"
    spec = importlib.util.spec_from_file_location(f"checks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercise(notebook: str, name: str) -> Exercise:
    """An exercise by its name in the checks."""
    return getattr(checks(notebook), name)


def stub(notebook: str, name: str, known: dict):
    """What the reader finds in the answer's cell: that cell up to its last line, which checks it."""
    (path,) = NOTEBOOKS.glob(f"{notebook[:2]}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    (own,) = (c for c in cells if re.search(rf"^{name}\.check\(\w+\)$", c.source.strip().splitlines()[-1]))
    *lines, last = own.source.strip().splitlines()
    code = "\n".join(lines)
    linecache.cache[own.id] = (len(code), None, code.splitlines(keepends=True), own.id)  # as IPython does
    namespace = dict(known)
    exec(compile(code, own.id, "exec"), namespace)
    return namespace[re.search(r"check\((\w+)\)", last)[1]]


def solution(task: Exercise, known: dict):
    """What the last hint defines: its function or variable, the last name that it binds."""
    hint = task._hints[-1]
    fenced = re.search(r"```python\n(.*?)```", hint, re.DOTALL)
    code = fenced[1] if fenced else hint.strip("`")
    namespace = dict(known)
    exec(code, namespace)
    bound = [node for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.Assign))]
    last = bound[-1]
    return namespace[last.name if isinstance(last, ast.FunctionDef) else last.targets[0].id]


def assert_ladder(notebook: str, name: str, known: dict) -> None:
    """The stub in the notebook is "not done yet", and the solution in the last hint passes.

    Args:
        known: what earlier cells of the notebook define, and stub and solution use.
    """
    task = exercise(notebook, name)
    result = task.check(stub(notebook, name, known))
    assert result.status == "not done yet", result
    result = task.check(solution(task, known))
    assert result.status == "passes", result


def assert_told(task: Exercise, answer, message: str) -> None:
    """A wrong answer is not right, and is told this."""
    result = task.check(answer)
    assert result.status == "not right" and message in result.message, result
