"""The notebook runner: real kernels on tiny notebooks, pages that need no network, failures that are reported."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from fakit.teaching.pages import formula
from fakit.teaching.runner import NotebookResult, describe, exit_status, find_notebooks, read_notebook, run_notebooks

DRAW = """
from fakit.figures import gradient_bars
print("profile is", PROFILE)
gradient_bars({"features": 2.0, "task": 0.5})
"""
LINKS = """
from IPython.display import Markdown
Markdown("[the second](01_broken.ipynb)")
"""
LINKED = (
    "[the third](02_third.ipynb#part), [the ninth](09_ninth.ipynb), [maps](../docs/maps.md), "
    "[elsewhere](https://example.org/a.ipynb)"
)
LAST = """
from IPython.display import Markdown, display
import sys
print("done", file=sys.stderr)
display(Markdown("a loss of $\\\\frac{1}{2}$ and a **word**"))
"""


def write(folder: Path, name: str, title: str, question: str, *cells: str, tag: str = "parameters") -> Path:
    new = nbformat.v4
    header = f"# {title}\n\n**Question:** {question}\n\n$$L = \\sum_j w_j L_j$$\n\nInline $\\tau^2$ and unknown $\\nosuchthing{{x}}$."
    first = new.new_code_cell('PROFILE = "full"', metadata={"tags": [tag]})
    body = [new.new_markdown_cell(header), first, *map(new.new_code_cell, cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(new.new_notebook(cells=body, metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of three notebooks: one that works, one that fails in its second code cell, one that works."""
    folder, out = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("reports")
    first = write(folder, "00_first", "00 · The first", "What is drawn?", DRAW, LINKS, LAST)
    notebook = nbformat.read(first, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell(LINKED))
    nbformat.write(notebook, first)
    write(folder, "01_broken", "Broken", "What happens then?", "value = {'a': 1}\nvalue['b']", "print('never')")
    write(
        folder,
        "02_third",
        "Third",
        "Does it still run?",
        "import os; print('threads', os.environ['OMP_NUM_THREADS'], os.getcwd())",
    )
    return folder, out, run_notebooks(folder, out, profile="quick", jobs=2, timeout=600)


def test_results_name_the_notebook_the_cell_and_the_error(run):
    _, _, results = run
    assert [(r.number, r.status) for r in results] == [("00", "ok"), ("01", "failed"), ("02", "ok")]
    assert results[0].title == "The first" and results[0].question == "What is drawn?"
    assert results[1].cell == 2 and results[1].error == "KeyError: 'b'"
    assert "01_broken" in str(results[1]) and "cell 2: KeyError: 'b'" in str(results[1])
    assert exit_status(results) == 1 and exit_status([results[0], results[2]]) == 0


def test_profile_is_injected_and_cells_run_in_the_notebooks_folder(run):
    folder, out, _ = run
    first, third = ((out / f"{name}.html").read_text() for name in ("00_first", "02_third"))
    assert "profile is quick" in first
    assert str(folder) in third and re.search(r"threads \d", third)


def test_figures_are_static_first_and_interactive_by_a_relative_script(run):
    _, out, _ = run
    page = (out / "00_first.html").read_text()
    figure = re.search(r'<figure class="fakit-figure" aria-label="([^"]*)">(.*?)</figure>', page, re.DOTALL)
    assert "features term pulls hardest" in figure[1]
    assert "<svg" in figure[2] and "Gradient norm by term" in figure[2]
    spec = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure[2], re.DOTALL)[1])
    assert spec["data"][0]["type"] == "bar"
    assert '<script src="assets/plotly.min.js" defer>' in page
    assert (out / "assets" / "plotly.min.js").stat().st_size > 1_000_000


def test_no_page_asks_another_host_for_anything(run):
    _, out, _ = run
    for path in out.glob("*.html"):
        page = path.read_text()
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?:https?:)?//', page), path.name
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", page), path.name
        assert not re.search(r"mathjax|require\.js|jquery", page, re.IGNORECASE), path.name


def test_a_failing_notebook_has_a_page_with_its_traceback(run):
    _, out, _ = run
    page = (out / "01_broken.html").read_text()
    assert (
        "KeyError" in page
        and "Traceback" in page
        and "never" not in re.sub(r"<div class=\"input.*?</pre>", "", page, flags=re.DOTALL)
    )
    assert "failed" in page and "cell 2" in page


def test_pages_link_to_their_neighbors_and_the_index(run):
    _, out, _ = run
    page = (out / "01_broken.html").read_text()
    assert 'rel="prev" href="00_first.html"' in page and 'rel="next" href="02_third.html"' in page
    assert 'href="index.html"' in page


def test_links_between_notebooks_lead_to_their_pages(run):
    folder, out, _ = run
    page = (out / "00_first.html").read_text()
    assert '<a href="02_third.html#part">the third</a>' in page  # of a markdown cell
    assert '<a href="01_broken.html">the second</a>' in page  # of an output
    assert "09_ninth" not in page and "the ninth" in page  # no page: the text alone
    other = re.search(r'<a href="([^"]*maps\.md)">', page)[1]
    assert (out / other).resolve() == (folder.parent / "docs/maps.md").resolve()
    assert '<a href="https://example.org/a.ipynb">' in page


def test_the_index_has_a_card_a_notebook(run):
    _, out, _ = run
    index = (out / "index.html").read_text()
    assert index.count("class='card'") == 3
    for text in (
        "What is drawn?",
        "Does it still run?",
        "KeyError",
        "2 of 3 notebooks ran through, 1 failed",
        "profile quick",
        "torch",
    ):
        assert text in index
    assert index.count("<svg") == 1 and "Gradient norm by term" in index


def test_only_adds_to_an_earlier_report(run, tmp_path):
    folder, out, _ = run
    shutil.copytree(out, tmp_path / "again")
    results = run_notebooks(folder, tmp_path / "again", only="02", jobs=1)
    assert [r.name for r in results] == ["02_third"] and exit_status(results) == 0
    index = (tmp_path / "again" / "index.html").read_text()
    assert "2 of 3 notebooks ran through, 1 failed" in index


def test_formulas_are_drawn_offline_or_left_readable(run):
    _, out, _ = run
    page = (out / "00_first.html").read_text()
    assert page.count("</math>") == 3  # display, inline, and the one in an output
    assert '<code class="tex">\\nosuchthing{x}</code>' in page and "<code" in formula("{")
    norm = formula(r"\lVert H_S - H_T \rVert^2")
    assert "<msub><mi>H</mi><mi>S</mi></msub>" in norm and 'aria-label="\\lVert H_S - H_T \\rVert^2"' in norm
    two = ElementTree.fromstring(formula(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", display=True))
    assert len(list(two.iter("{http://www.w3.org/1998/Math/MathML}mtr"))) == 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"profile": "fast"}, "profile 'fast' is not known: use one of quick, workshop, full"),
        ({"only": "07"}, "no notebook 07 in .*it holds 00_first"),
        ({"jobs": 0}, "at least one notebook"),
    ],
)
def test_wrong_requests_are_answered_before_anything_runs(run, tmp_path, ask, message):
    folder, _, _ = run
    with pytest.raises(ValueError, match=message):
        run_notebooks(folder, tmp_path / "none", **ask)
    assert not (tmp_path / "none").exists()


def test_a_notebook_without_parameters_cell_is_refused(tmp_path):
    path = write(tmp_path, "00_untagged", "Untagged", "Why?", "1", tag="other")
    with pytest.raises(ValueError, match=r"00_untagged\.ipynb has no cell tagged 'parameters'"):
        read_notebook(path, "quick")
    (tmp_path / "01_broken.ipynb").write_text("{not json")
    with pytest.raises(ValueError, match="not a readable notebook"):
        read_notebook(tmp_path / "01_broken.ipynb", "quick")
    with pytest.raises(ValueError, match="no numbered notebook"):
        find_notebooks(tmp_path / "nowhere")


def test_description_reads_title_and_question_from_the_header(tmp_path):
    text = "# `02` CKA similarity\n\n| **Question** | what do *teacher* and student share? |\n|---|---|\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    found = describe(notebook, Path("02_cka_similarity.ipynb"), "quick")
    assert isinstance(found, NotebookResult)
    assert (found.title, found.question) == ("CKA similarity", "what do teacher and student share?")


def test_the_longest_starts_first_and_results_stay_in_order(tmp_path, capsys):
    for name, told in (("00_a", ""), ("01_b", "about 80 s"), ("02_c", "about 2 minutes"), ("03_d", "about 90 seconds")):
        write(tmp_path, name, name, f"Why?\n\n*Running:* {told}", "1")
    results = run_notebooks(tmp_path, tmp_path / "out", jobs=1)
    started = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" start")]
    assert started == ["02_c", "03_d", "01_b", "00_a"]
    assert [result.name for result in results] == ["00_a", "01_b", "02_c", "03_d"]


def test_a_cell_that_takes_too_long_is_reported(tmp_path):
    write(tmp_path, "00_slow", "Slow", "How long?", "import time; time.sleep(60)")
    (result,) = run_notebooks(tmp_path, tmp_path / "out", timeout=1, jobs=1)
    assert result.status == "failed" and result.cell == 2 and "longer than 1 s" in result.error


def test_figures_show_from_disk_in_a_browser_without_network(run):
    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if chromium is None:  # the same content without a browser: the SVG is in the page
        assert "<svg" in (run[1] / "00_first.html").read_text()
        return
    _, out, _ = run
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"file://{out}/00_first.html"]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    assert 'data-figures="ready"' in page and "main-svg" in page
    assert re.search(r'<div class="static" hidden="">', page)


def test_the_cell_tagged_centerpiece_stands_for_the_notebook():
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    from fakit.teaching.pages import centerpiece

    def drawn(svg, tags=()):
        output = new_output("display_data", {"image/svg+xml": svg})
        return new_code_cell("figure", outputs=[output], metadata={"tags": list(tags)})

    first, tagged = drawn("<svg>1</svg>"), drawn("<svg>2</svg>", ["centerpiece"])
    assert centerpiece(new_notebook(cells=[first, tagged])) == "<svg>2</svg>"
    assert centerpiece(new_notebook(cells=[first])) == "<svg>1</svg>"
    assert centerpiece(new_notebook(cells=[new_code_cell("x = 1")])) is None


def test_a_cell_with_folded_source_is_folded_on_the_page():
    from nbformat.v4 import new_code_cell, new_notebook

    from fakit.teaching.pages import notebook_page

    folded = new_code_cell("folded_source", metadata={"jupyter": {"source_hidden": True}})
    result = NotebookResult("00", "00_one", "One", "?")
    page = notebook_page(new_notebook(cells=[new_code_cell("open_source"), folded]), result, [result])
    inside = "".join(re.findall(r"<details.*?</details>", page, re.DOTALL))
    assert "folded_source" in inside and "open_source" not in inside and "open_source" in page
