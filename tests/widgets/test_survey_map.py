"""The survey's map as a widget and a page: what is read of a method or a place is what the recipes say."""

import json
import re

import pytest

from fakit import recipes
from fakit.recipes.recipe import Recipe
from fakit.widgets import survey_map


def test_methods_and_places_of_the_kit_each_with_something_to_read():
    made = survey_map()
    assert {one["name"] for one in made.survey["methods"]} == set(recipes.RECIPES)
    names = [one["name"] for key in ("methods", "places") for one in made.survey[key]]
    assert list(made.pages) == names and made.selected == names[0]
    tinybert = made.pages["tinybert"]
    assert (
        "<math" in tinybert
        and "77.0 of 79.5" in tinybert
        and "score_mse" in tinybert
        and "recipe: tinybert" in tinybert
    )
    assert "tinybert (2020): <code>score_mse</code>" in made.pages["attention"]


def test_what_is_not_on_the_map_is_named():
    with pytest.raises(ValueError, match=r"'tinybrt' is not on the map; there are distilbert"):
        survey_map(selected="tinybrt")
    with pytest.raises(ValueError, match="at least one recipe"):
        survey_map([])


def test_what_recipes_say_is_text_and_no_markup():
    hostile = Recipe("mine", "<b>bold", "</script><i>", "a < b", {"outputs": {}}, {"k<": "<u>"}, ("<s>",), "<em>")
    made = survey_map([hostile])
    page = made.pages["mine"]
    assert not re.search(r"<(b>bold|i>|u>|s>|em>)", page) and "&lt;b&gt;bold" in page
    html = made.html()
    state = re.search(r'<script type="application/json" id="state">(.*?)</script>', html, re.S)[1]
    assert json.loads(state)["pages"]["mine"] == page
    assert html.count("</script>") == 2


def test_the_page_is_one_file_without_a_network(tmp_path):
    path = survey_map(selected="pkd").to_html(tmp_path / "map.html")
    text = path.read_text()
    outside = set(re.findall(r"https?://[^\"'\\ )<]+", text)) - {"http://www.w3.org/1998/Math/MathML"}
    assert not outside and "<noscript>The survey's map" in text.replace("&#x27;", "'")
    with pytest.raises(ValueError, match=r"use \.html"):
        survey_map().to_html(tmp_path / "map.pdf")


def test_a_page_without_a_kernel_has_the_picture():
    data, _ = survey_map()._repr_mimebundle_()
    assert data["image/svg+xml"].startswith("<svg") and data["text/plain"].startswith(
        f"The survey's map: {len(recipes.RECIPES)} methods"
    )
