"""How every notebook is laid out: the method is visible and short, its links lead somewhere, its checks live elsewhere."""

import re
from statistics import median

import nbformat
import pytest

from fakit.teaching import Exercise
from tests.notebooks.cells import NOTEBOOKS, checks

WIDTH = 100  # characters that a cell of JupyterLab and of the report shows without a scroll bar
FILES = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
HEADER = r"""# \d\d · [^\n]+

\*\*Question: [^\n]+\?\*\*

After this notebook you can

(?:- \*\*[^\n]+\n)+
\| you need \| to read \| to run \| network \|
\|---\|---\|---\|---\|
\| [^|\n]+ \| \d+ minutes \| about \d+ s on 2 CPU cores \(`quick`\) \| (?:no|yes) \|"""


def cells(path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def shown(path) -> list[nbformat.NotebookNode]:
    """The code cells that a page shows open."""
    code = [cell for cell in cells(path) if cell.cell_type == "code"]
    return [cell for cell in code if not cell.metadata.get("jupyter", {}).get("source_hidden")]


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


@each
def test_one_form_of_header(path):
    assert re.match(HEADER, cells(path)[0].source)


@each
def test_the_method_is_visible(path):
    """Short cells, no page of plumbing: one cell, a training loop, may be longer than the rest."""
    sizes = [lines(cell) for cell in shown(path)]
    tags = {tag: cell for cell in shown(path) for tag in cell.metadata.get("tags", [])}
    assert median(sizes) <= 8 and sum(sizes) <= 300, (median(sizes), sum(sizes))
    assert lines(tags["setup"]) <= 15
    assert not [cell.id for cell in shown(path) if lines(cell) > 30 and cell is not tags.get("loop")]


@each
def test_visible_code_is_not_cut_at_the_right(path):
    wide = [(cell.id, line) for cell in shown(path) for line in cell.source.splitlines() if len(line) > WIDTH]
    assert len(shown(path)) > 10 and not wide


@each
def test_links_lead_to_files(path):
    """In markdown cells and in the markdown that code cells make; names put in by code (`{name}.ipynb`)
    are not followed.
    """
    targets = [target for c in cells(path) for target in re.findall(r"\]\(([^)\s#:{}]+)(?:#[^)]*)?\)", c.source)]
    files = [target for target in targets if re.search(r"\.\w+$", target)]
    assert path == FILES[-1] or any(target.endswith(".ipynb") for target in files)  # the last has no next one
    assert not [target for target in files if not (path.parent / target).exists()]


@each
def test_exercises_say_what_they_ask_for(path):
    """Every exercise of the notebook's checks is shown, answered and hinted at in it, with its difficulty and minutes."""
    exercises = {name: it for name, it in vars(checks(path.stem)).items() if isinstance(it, Exercise)}
    assert 2 <= len(exercises) <= 5
    source = "\n".join(cell.source for cell in cells(path) if cell.cell_type == "code")
    for name, exercise in exercises.items():
        assert exercise.difficulty and exercise.minutes and exercise.number.startswith(path.stem[:2]), name
        assert re.search(rf"^(from checks\.nb{path.stem[:2]} import .*\b{name}\b|{name}$)", source, re.MULTILINE), name
        assert re.search(rf"^{name}\.check\(\w+\)$", source, re.MULTILINE), name
        assert re.search(rf"^{name}\.hints\(\)$", source, re.MULTILINE), name
    assert "Exercise(" not in source
