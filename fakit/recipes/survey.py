"""The survey's map: what each recipe aligns, where, by which loss, and who proposed it.

The places are those of the survey of feature alignment (Yang et al. 2025, arXiv 2504.13825), made finer where recipes
differ: its attention-based methods are `attention` and `attention output`, its logit-based ones `outputs`.
All of it is read off the recipes' own settings, so that a new recipe stands on the map by itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fakit.recipes import RECIPES
from fakit.recipes.recipe import Recipe

#: What may be aligned, along the way through a model.
PLACES = {
    "embeddings": "the embeddings' output, layer 0",
    "hidden states": "the output of whole blocks, token by token",
    "across layers": "how hidden states go on from layer to layer, or several layers at once",
    "texts": "one vector a text, pooled from its tokens",
    "vocabulary": "hidden states read through the model's own head",
    "inside blocks": "what a block's MLP makes: its gate, its inner states, its output",
    "attention": "where tokens look: maps, scores, or relations of queries, keys and values",
    "attention output": "what attention adds to the hidden states",
    "outputs": "the distribution over classes or tokens",
    "labels": "the task's own loss, without a teacher",
}
_KINDS = {
    "pooled": "texts",
    "dynamics": "across layers",
    "flow": "across layers",
    "layer_attention": "across layers",
    "earth_mover": "across layers",
    "lens": "vocabulary",
    "attention": "attention",
    "outputs": "outputs",
}
# of `Features(at=…)`
_AT = {
    "block": "hidden states",
    "attention": "attention output",
    **dict.fromkeys(("mlp", "up", "gate"), "inside blocks"),
    **dict.fromkeys(("queries", "keys", "values"), "attention"),
}


@dataclass(frozen=True)
class Alignment:
    """One term of a recipe on the map.

    Attributes:
        recipe: its name.
        place: of `PLACES`.
        loss: by its name in `Features(loss)`, `Outputs(loss)` and so on.
        layers: the layer map's name, or its pairs; "" where there are no layers.
        weight: as the recipe sets it.
    """

    recipe: str
    place: str
    loss: str
    layers: str
    weight: str


def alignments(recipe: Recipe) -> list[Alignment]:
    """The terms of a recipe, in the order of `PLACES`.

    >>> from fakit import recipes
    >>> for term in alignments(recipes.tinybert()):
    ...     print(term.place, term.loss, term.layers, "|", term.weight)
    embeddings mse 0 ← 0 | 1 → 0 (steps)
    hidden states mse uniform | 1 → 0 (steps)
    attention score_mse uniform | 1 → 0 (steps)
    outputs forward_kl  | 0 → 1 (steps)
    """
    settings = recipe.configuration
    terms = [(kind, settings[kind]) for kind in ("features", "attention", "outputs") if settings[kind] is not None]
    terms += [(term["kind"], term) for term in settings["terms"].values()]
    found = [_alignment(recipe.name, kind, term, settings["layer_map"]) for kind, term in terms]
    if settings["task_weight"] is not None:
        found.append(Alignment(recipe.name, "labels", "task", "", _number(settings["task_weight"])))
    order = list(PLACES)
    return sorted(found, key=lambda one: order.index(one.place))


def survey(of: Iterable[Recipe] | None = None) -> list[dict[str, Any]]:
    """One row a recipe, oldest first: name, title, source, year, equation, settings, ours, published, evidence, and
    its `alignments`.

    Args:
        of: recipes; all of the kit's unless given.
    """
    rows = [
        {
            "name": recipe.name,
            "title": recipe.title,
            "source": recipe.source,
            "year": year_of(recipe),
            "equation": " ".join(recipe.equation.split()),
            "settings": recipe.to_yaml(),
            "published": dict(recipe.published),
            "ours": list(recipe.ours),
            "evidence": recipe.evidence,
            "alignments": alignments(recipe),
        }
        for recipe in ([make() for make in RECIPES.values()] if of is None else of)
    ]
    return sorted(rows, key=lambda row: (row["year"] is None, row["year"] or 0))


def year_of(recipe: Recipe) -> int | None:
    """The first year that the recipe's source names: "EMNLP 2019", or the "1908" of an arXiv number; None where it
    names none.
    """
    spoken = re.search(r"\b(?:19|20)\d\d\b(?!\.)", recipe.source)
    number = re.search(r"\barXiv (\d\d)\d\d\.\d+", recipe.source)
    return int(spoken[0]) if spoken else 2000 + int(number[1]) if number else None


def _alignment(recipe: str, kind: str, term: Mapping[str, Any], layer_map: Any) -> Alignment:
    layers = term.get("layer_map", layer_map)
    at = _KINDS.get(kind) or _AT[term.get("at", "block")]
    if at == "hidden states" and isinstance(layers, list) and all(pair == [0, 0] for pair in layers):
        at = "embeddings"
    said = ", ".join(f"{s} ← {t}" for s, t in layers) if isinstance(layers, list) else str(layers)
    return Alignment(
        recipe,
        at,
        term.get("loss") or _usual_loss(kind),
        "" if at == "outputs" else said,
        _number(term.get("weight", 1.0)),
    )


def _usual_loss(kind: str) -> str:
    """The loss of a term that names none; of one that has a single loss the term's own name."""
    from fakit.objective.attention import Attention
    from fakit.objective.feature_terms import KINDS
    from fakit.objective.features import Features
    from fakit.objective.outputs import Outputs

    made = {"features": Features, "attention": Attention, "outputs": Outputs, **KINDS}[kind]
    parameter = inspect.signature(made).parameters.get("loss")
    return kind if parameter is None else str(parameter.default)


def _number(weight: Any) -> str:
    """A weight, or how it goes: "1 → 0.1 (cosine)"."""
    if isinstance(weight, Mapping):
        return f"{weight['from']:g} → {weight['to']:g} ({weight.get('kind', 'linear')})"
    return f"{weight:g}"
