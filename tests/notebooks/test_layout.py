"""How every notebook is laid out: its code fits a page, its links lead somewhere, its answers are folded away."""

import re

import nbformat
import pytest

from tests.notebooks.cells import NOTEBOOKS

WIDTH = 100  # characters that a cell of JupyterLab and of the report shows without a scroll bar
FILES = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def cells(path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


@each
def test_visible_code_is_not_cut_at_the_right(path):
    visible = [
        c for c in cells(path) if c.cell_type == "code" and not c.metadata.get("jupyter", {}).get("source_hidden")
    ]
    wide = [(c.id, line) for c in visible for line in c.source.splitlines() if len(line) > WIDTH]
    assert len(visible) > 10 and not wide


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
def test_a_cell_that_shows_an_exercise_hides_its_source(path):
    making = [c for c in cells(path) if c.cell_type == "code" and "= Exercise(" in c.source]
    assert 2 <= len(making) <= 4
    assert not [c.id for c in making if not c.metadata.get("jupyter", {}).get("source_hidden")]
