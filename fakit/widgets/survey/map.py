"""The survey's map as a widget and as a page: press a method or a place, read its equation and evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import anywidget
import traitlets

from fakit.figures.survey import what_is_aligned
from fakit.files import write_whole
from fakit.recipes.recipe import Recipe
from fakit.recipes.survey import PLACES, survey
from fakit.teaching.pages import formula
from fakit.widgets.panel import script_json, with_still

HERE = Path(__file__).parent
KINDS = {"attention": "attention", "attention output": "attention", "outputs": "outputs", "labels": "labels"}
PAGE = HERE / "page.html"


class SurveyMap(anywidget.AnyWidget):
    """See `survey_map`.

    Attributes:
        selected: a recipe's name or a place; may be set.
    """

    _esm = HERE / "map.js"
    _css = HERE / "map.css"
    survey = traitlets.Dict(help="methods and places").tag(sync=True)
    pages = traitlets.Dict(help="what is read of each, as HTML").tag(sync=True)
    selected = traitlets.Unicode().tag(sync=True)

    def __init__(self, recipes: Iterable[Recipe] | None = None, selected: str | None = None):
        self._rows = survey(recipes)
        if not self._rows:
            raise ValueError("the survey's map needs at least one recipe; found none.")
        used = {found.place for row in self._rows for found in row["alignments"]}
        places = [{"name": place, "kind": KINDS.get(place, "states")} for place in PLACES if place in used]
        methods = [
            {"name": row["name"], "year": row["year"], "alignments": [asdict(one) for one in row["alignments"]]}
            for row in self._rows
        ]
        pages = {row["name"]: method_page(row) for row in self._rows}
        pages |= {place["name"]: place_page(place["name"], self._rows) for place in places}
        self._known = list(pages)
        super().__init__(
            survey={"methods": methods, "places": places},
            pages=pages,
            selected=methods[0]["name"] if selected is None else selected,
        )

    @traitlets.validate("selected")
    def _check_selected(self, proposal: dict) -> str:
        if proposal["value"] not in self._known:
            raise ValueError(f"{proposal['value']!r} is not on the map; there are {', '.join(self._known)}.")
        return proposal["value"]

    @property
    def figure(self):
        """The same as a picture, for pages without a kernel."""
        return what_is_aligned(self._rows)

    def to_html(self, path: str | Path) -> Path:
        """Write the map as one page, which needs no kernel and no network.

        Raises:
            ValueError: another ending than `.html`.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"cannot save the survey's map as {path.suffix or path.name!r}: use .html")
        write_whole(path, self.html())
        return path

    def html(self) -> str:
        """The page that `to_html` writes."""
        state = {name: getattr(self, name) for name in ("survey", "pages", "selected")}
        return Template(PAGE.read_text(encoding="utf-8")).substitute(
            css=(HERE / "map.css").read_text(encoding="utf-8"),
            sentence=escape(repr(self)),
            state=script_json(state),
            esm=(HERE / "map.js").read_text(encoding="utf-8"),
        )

    def __repr__(self) -> str:
        return f"The survey's map: {self.figure.summary}"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return with_still(super()._repr_mimebundle_(**kwargs), self.figure, repr(self))


def survey_map(recipes: Iterable[Recipe] | None = None, selected: str | None = None) -> SurveyMap:
    """Every recipe by what it aligns, where, and by which loss, after the survey of feature alignment (Yang et al.
    2025, arXiv 2504.13825); press a method for its equation, settings and evidence, a place for who aligns it.

    Args:
        recipes: all of `fakit.recipes` unless given.
        selected: a recipe or a place that is open at first; the oldest recipe unless given.

    Raises:
        ValueError: no recipe, or a `selected` that is not on the map.

    >>> survey_map(selected="tinybert")  # doctest: +SKIP
    >>> survey_map().to_html("survey.html")  # doctest: +SKIP
    """
    return SurveyMap(recipes, selected)


def method_page(row: Mapping[str, Any]) -> str:
    """What is read of a method: title, source, equation, where it aligns, settings, what is ours, evidence."""
    aligned = "".join(
        f"<li><b>{escape(one.place)}</b> by <code>{escape(one.loss)}</code>"
        + (f", layers {escape(one.layers)}" if one.layers else "")
        + f", weight {escape(one.weight)}</li>"
        for one in row["alignments"]
    )
    said = [
        f"<h3>{escape(row['title'])}</h3><p>{escape(row['source'])}</p>",
        f"<p>{formula(row['equation'], display=True)}</p><ul>{aligned}</ul>",
    ]
    published = [f"{key}: {value}" for key, value in row["published"].items()]
    said += [f"<p>Evidence: {escape(row['evidence'])}</p>"] * bool(row["evidence"])
    said += [f"<p>Ours:</p>{_list(row['ours'])}"] * bool(row["ours"])
    said += [f"<p>Published beside it, and not set:</p>{_list(published)}"] * bool(published)
    said.append(f"<details><summary>Its settings</summary><pre>{escape(row['settings'].rstrip())}</pre></details>")
    return "".join(said)


def place_page(place: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """What is read of a place: what it is, and who aligns it by which loss."""
    found = [
        f"<li>{escape(row['name'])} ({row['year'] or 'year unknown'}): <code>{escape(one.loss)}</code></li>"
        for row in rows
        for one in row["alignments"]
        if one.place == place
    ]
    return f"<h3>{escape(place)}</h3><p>{escape(PLACES[place])}</p><ul>{''.join(found)}</ul>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
