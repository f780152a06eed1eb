"""Pages in docs/: the instructor guide knows every exercise, the map study's page says what is recorded,
links lead somewhere.
"""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from fakit.experiments import RunStore, Study, map_scores, recorded_similarity
from fakit.experiments.map_report import map_correlations, map_markdown
from fakit.losses import features, outputs
from fakit.widgets import survey_map
from scripts import doctor_page, losses_page

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/instructor_guide.md").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_has_its_row_with_answer_wrong_answers_and_question(path):
    cells = nbformat.read(path, as_version=4).cells
    exercises = sum(
        c.cell_type == "code" and re.search(r"^\w+\.check\(\w+\)$", c.source, re.M) is not None for c in cells
    )
    number = path.stem[:2]
    rows = re.findall(rf"^\| {number}\.(\d) \|(.*)\|$", GUIDE, re.MULTILINE)
    assert [int(k) for k, _ in rows] == list(range(1, exercises + 1))
    for _, row in rows:
        parts = [part.strip() for part in row.split("|")]
        assert len(parts) == 3 and all(parts), row


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_page_on_maps_is_the_recorded_study():
    folder = ROOT / "data/recorded/maps"
    table = map_scores(folder)
    study = Study.from_yaml(ROOT / "configs/maps.yaml")
    assert all(seeds == study.seeds for seeds in table["seeds"]) and len(table) == 2 * 23
    ids = {record["run_id"] for record in RunStore.open(folder).records()}
    assert ids == {config.run_id for config in study.runs()}
    text = map_markdown(table, map_correlations(table), recorded_similarity(folder))
    page = (ROOT / "docs/layer_maps.md").read_text()
    assert re.search(r"<!-- maps[^>]*-->\n(.*?)<!-- /maps -->", page, re.S)[1].strip() == text.strip()


def test_the_page_of_losses_is_what_the_code_says():
    assert (ROOT / "docs/losses.md").read_text() == losses_page.page(), "run python scripts/losses_page.py"
    assert losses_page.SURVEY.read_text() == survey_map(selected="feature_alignment").html(), "the same"


def test_the_page_of_the_doctor_is_what_its_rules_say():
    assert doctor_page.PAGE.read_text() == doctor_page.page(), "run python scripts/doctor_page.py"


def test_losses_equal_released_code_or_the_page_says_why():
    """docs/peers.md, as it was recorded: its packages are not installed here."""
    lines = (ROOT / "docs/peers.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][2:]
    assert {row[0] for row in rows} == {"TRL", "Liger", "TextBrewer", "sentence-transformers", "optipfair"}
    for peer, theirs, _, value, gradient, *why in rows:
        least = 1e-7 if why and why[0] else 1e-11
        assert float(value) < least and (float(gradient) < least or "trains nothing" in why[0]), (peer, theirs)
    named = {name for row in rows for name in re.findall(r"\w+", row[2])}
    assert named & features.LOSSES.keys() >= {"mse", "l2", "cosine", "nst", "normalized_mse"}
    assert named & outputs.LOSSES.keys() >= {"forward_kl", "reverse_kl", "jsd", "skew_reverse_kl", "logit_mse"}


def test_plans_take_the_minutes_that_they_say():
    short = GUIDE[GUIDE.index("### 90 minutes") : GUIDE.index("### Half a day")]
    spans = [tuple(map(int, span)) for span in re.findall(r"^\| (\d+)–(\d+) \|", short, re.MULTILINE)]
    assert spans[0][0] == 0 and spans[-1][1] == 90
    half = GUIDE[GUIDE.index("### Half a day") : GUIDE.index("### Two days")]
    more = [tuple(map(int, span)) for span in re.findall(r"^\| (\d+)–(\d+) \|", half, re.MULTILINE)]
    assert more[0][0] == 0 and more[-1][1] == 210
    for plan in (spans, more):
        assert all(end == start for (_, end), (start, _) in pairwise(plan))
