"""The survey's map is read off the recipes: what each aligns, where, by which loss."""

import pytest

from fakit import recipes
from fakit.figures import what_is_aligned
from fakit.objective.feature_terms import KINDS
from fakit.objective.features import PLACES as AT
from fakit.recipes.recipe import Recipe
from fakit.recipes.survey import PLACES, Alignment, alignments, survey, year_of


def a_recipe(**settings) -> Recipe:
    return Recipe("mine", "A title", "Somebody 2031", "L = 1", settings)


def test_every_recipe_stands_on_the_map_with_all_of_its_terms():
    rows = {row["name"]: row for row in survey()}
    assert set(rows) == set(recipes.RECIPES)
    for name, make in recipes.RECIPES.items():
        settings = make().configuration
        terms = [settings[key] for key in ("features", "attention", "outputs", "task_weight")]
        number = sum(term is not None for term in terms) + len(settings["terms"])
        assert len(rows[name]["alignments"]) == number > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_term_has_a_place(kind):
    (found,) = alignments(a_recipe(terms={"it": {"kind": kind}}))
    assert found.place in PLACES and found.place not in ("outputs", "labels", "attention") and found.loss


def test_a_term_that_names_no_loss_has_its_class_s():
    found = {a.place: a.loss for a in alignments(a_recipe(features={}, attention={}, outputs={}))}
    assert found == {"hidden states": "mse", "attention": "kl", "outputs": "forward_kl"}
    assert alignments(a_recipe(terms={"it": {"kind": "lens"}}))[0].loss == "jsd"
    assert alignments(a_recipe(terms={"it": {"kind": "flow"}}))[0].loss == "flow"


def test_layers_weights_and_places_are_those_of_the_term():
    schedule = {"from": 1.0, "to": 0.1, "kind": "cosine"}
    mine = a_recipe(
        layer_map="skip",
        features={"loss": "cosine", "at": "attention", "weight": schedule},
        terms={"first": {"kind": "features", "layer_map": [[0, 0]], "weight": 3}, "ends": {"kind": "features", "layer_map": [[0, 0], [2, 4]]}},
        task_weight=0.25,
    )  # fmt: skip
    assert alignments(mine) == [
        Alignment("mine", "embeddings", "mse", "0 ← 0", "3"),
        Alignment("mine", "hidden states", "mse", "0 ← 0, 2 ← 4", "1"),
        Alignment("mine", "attention output", "cosine", "skip", "1 → 0.1 (cosine)"),
        Alignment("mine", "labels", "task", "", "0.25"),
    ]


@pytest.mark.parametrize("at", AT)
def test_every_place_of_features_is_on_the_map(at):
    (found,) = alignments(a_recipe(features={"at": at}))
    assert found.place == {"block": "hidden states", "attention": "attention output"}.get(
        at, "attention" if at in ("queries", "keys", "values") else "inside blocks"
    )


def test_years_are_the_source_s_own():
    assert year_of(a_recipe()) == 2031
    assert year_of(Recipe("x", "t", "arXiv 1909.10351", "L", {})) == 2019
    assert year_of(Recipe("x", "t", "a repository", "L", {})) is None
    years = [row["year"] for row in survey()]
    known = [year for year in years if year is not None]
    assert known == sorted(known) and years[: len(known)] == known and known[0] == 2019


def test_the_figure_has_a_mark_for_each():
    rows = survey()
    figure = what_is_aligned(rows)
    marks = {trace.name: len(trace.x) for trace in figure.plotly.data}
    counts = {place: sum(a.place == place for row in rows for a in row["alignments"]) for place in PLACES}
    assert marks == {place: count for place, count in counts.items() if count}
    (told,) = [t for trace in figure.plotly.data for t in trace.hovertext if t.startswith("tinybert: embeddings")]
    assert told == "tinybert: embeddings by mse, layers 0 ← 0, weight 1 → 0 (steps)"
    with pytest.raises(ValueError, match="at least one method"):
        what_is_aligned([])
