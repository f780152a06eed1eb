"""Recipes: published objectives as data, one file each.

    from fakit import recipes

    recipe = recipes.tinybert()      # prints its equation, its settings, and what of it is ours
    objective = recipe.objective(student, teacher)

In a configuration, `recipe: tinybert` stands for the same settings, and keys beside it change them.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fakit.recipes.alp_kd import alp_kd
from fakit.recipes.bert_emd import bert_emd
from fakit.recipes.cka import cka
from fakit.recipes.ctkd import ctkd
from fakit.recipes.distil_whisper import distil_whisper
from fakit.recipes.distilbert import distilbert
from fakit.recipes.distillm import distillm
from fakit.recipes.dkd import dkd
from fakit.recipes.draft import draft
from fakit.recipes.fdd import fdd
from fakit.recipes.feature_alignment import feature_alignment
from fakit.recipes.gkd import gkd
from fakit.recipes.jasper import jasper
from fakit.recipes.layer_reduction import layer_reduction
from fakit.recipes.maxtext import maxtext
from fakit.recipes.minilm import minilm
from fakit.recipes.minilmv2 import minilmv2
from fakit.recipes.mobilebert import mobilebert
from fakit.recipes.pkd import pkd
from fakit.recipes.rail_kd import rail_kd
from fakit.recipes.recipe import KEYS as KEYS
from fakit.recipes.recipe import Recipe
from fakit.recipes.rlkd import rlkd
from fakit.recipes.taid import taid
from fakit.recipes.tinybert import tinybert

RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        feature_alignment,
        distilbert,
        pkd,
        tinybert,
        mobilebert,
        minilm,
        minilmv2,
        cka,
        gkd,
        distillm,
        taid,
        rlkd,
        distil_whisper,
        layer_reduction,
        jasper,
        fdd,
        alp_kd,
        rail_kd,
        dkd,
        draft,
        maxtext,
        bert_emd,
        ctkd,
    )
}


def named(given: str | Mapping[str, Any]) -> Recipe:
    """The recipe that a configuration names: `tinybert`, or `{name: rlkd, dynamic: true}` with options of its function.

    Raises:
        ValueError: no such recipe, an option that it does not take, or a value that its losses refuse.

    >>> named({"name": "gkd", "beta": 0.1}).settings["outputs"]["beta"]
    0.1
    """
    options = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = options.pop("name", None)
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        raise ValueError(
            f"recipe: {given!r} is not known; choose one of {', '.join(sorted(RECIPES))}, or a mapping with its name "
            f"and options.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
    takes = inspect.signature(RECIPES[name]).parameters
    if unknown := [key for key in options if key not in takes]:
        raise ValueError(f"recipe.{unknown[0]}: {name} has no such option; it takes {', '.join(takes) or 'none'}.")
    return RECIPES[name](**options)
