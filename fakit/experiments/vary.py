"""What a study varies: functions that make `vary`, the name of each arm and what it changes.

A change is what `ExperimentConfig.replace` takes, such as {"features.weight": 0.1}; where it depends on the experiment
or on the seed, it is a function (config, seed) → configuration or changes. Another kind of study is another function,
and its line in KINDS.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from operator import attrgetter
from typing import Any

from fakit.experiments.config import ARMS, ExperimentConfig
from fakit.experiments.schema import did_you_mean
from fakit.experiments.terms import Pairs, highest, times
from fakit.layer_maps import LayerMap
from fakit.recipes import RECIPES, named

Changes = Mapping[str, Any]
Change = Changes | Callable[[ExperimentConfig, int], ExperimentConfig | Changes]
MOST_MAPS = 10_000
CONTROLS = ("none", "reverse", "random")
"""What `maps` adds to the increasing maps: no map, the uniform map upside down, and one in no order."""


def arms(names: Sequence[str] = tuple(ARMS)) -> dict[str, Change]:
    """The same experiment with some of its terms: none (labels alone), outputs, features, attention, all of them.

    Raises:
        ValueError: an arm that is not one of these, or that comes twice.

    >>> list(arms())
    ['none', 'outputs', 'features', 'attention', 'all']
    """
    for arm in names:
        if arm not in ARMS:
            raise ValueError(f"arms: {arm!r} is not one of {', '.join(ARMS)}.{did_you_mean(arm, ARMS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"arms: found {list(names)}, in which one comes twice.")
    return {arm: partial(_with_arm, arm) for arm in names}


def _with_arm(arm: str, config: ExperimentConfig, seed: int) -> ExperimentConfig:
    return config.with_arm(arm)


def maps(student_layers: int, teacher_layers: int) -> dict[str, Change]:
    """Every increasing layer map, named by its teacher layers ("2-4-6"), and three controls: no map,
    `LayerMap.reverse`, and "random", which gives each student layer any teacher layer, drawn anew for every seed.

    Raises:
        ValueError: more student layers than teacher layers, or numbers that count no layers.

    >>> maps(2, 4)["1-3"]
    {'layer_map': ((1, 1), (2, 3))}
    """
    for name, value in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"maps: {name} is {value!r}, expected a whole number of layers, at least 1.")
    if (count := math.comb(teacher_layers, student_layers)) > MOST_MAPS:
        raise ValueError(
            f"maps: of {student_layers} on {teacher_layers} layers there are {count:,} increasing maps, and each is "
            f"trained (at most {MOST_MAPS:,}); try some of them by name: {{uniform: {{layer_map: uniform}}}}."
        )
    found = {layer_map.name: layer_map for layer_map in increasing_maps(student_layers, teacher_layers)}
    found |= {"none": LayerMap.none(), "reverse": LayerMap.reverse(student_layers, teacher_layers)}
    changes: dict[str, Change] = {name: {"layer_map": tuple(m.pairs) or "none"} for name, m in found.items()}
    return changes | {"random": partial(_random_map, student_layers, teacher_layers)}


def _random_map(student_layers: int, teacher_layers: int, config: ExperimentConfig, seed: int) -> Changes:
    return {"layer_map": random_pairs(student_layers, teacher_layers, seed)}


def increasing_maps(student_layers: int, teacher_layers: int) -> list[LayerMap]:
    """Every map that gives each student layer a teacher layer of its own, deeper ones to deeper layers:
    T over S of them.

    Raises:
        ValueError: more student layers than teacher layers.

    >>> len(increasing_maps(3, 6))
    20
    """
    if student_layers > teacher_layers:
        raise ValueError(
            f"each of {student_layers} student layers would have a teacher layer of its own, and the teacher has "
            f"{teacher_layers}: make the student no deeper than its teacher."
        )
    chosen = combinations(range(1, teacher_layers + 1), student_layers)
    return [LayerMap(enumerate(layers, start=1), name="-".join(map(str, layers))) for layers in chosen]


def random_pairs(student_layers: int, teacher_layers: int, seed: int) -> Pairs:
    """A teacher layer for each student layer, drawn freely: any order, repeats allowed."""
    draw = random.Random(f"fakit maps {seed}")
    return tuple((layer, draw.randint(1, teacher_layers)) for layer in range(1, student_layers + 1))


def weights(factors: Mapping[str, Sequence[float]]) -> dict[str, Change]:
    """One weight at a time: the experiment as it is ("default"), then the weight of each term times each of its factors
    ("features × 0.25"), the other weights held.

    Args:
        factors: term → factors; "features", "attention", "outputs", "task", or the name of a further term.

    Raises:
        ValueError: no term, or factors that are no numbers from 0 up.

    >>> list(weights({"features": [0.25, 4], "task": [0.5]}))
    ['default', 'features × 0.25', 'features × 4', 'task × 0.5']
    """
    if not isinstance(factors, Mapping) or not factors:
        raise ValueError(f"weights: found {factors!r}, expected factors by term, such as {{'features': [0.25, 4]}}.")
    changes: dict[str, Change] = {"default": {}}
    for term, of_term in factors.items():
        numbers = of_term if isinstance(of_term, list | tuple) else ()
        if not numbers or not all(_is_factor(number) for number in numbers):
            raise ValueError(f"weights: found {of_term!r} for {term}, expected a list of factors from 0 up: [0.25, 4].")
        changes |= {f"{term} × {factor:g}": partial(_times, term, factor) for factor in numbers}
    return changes


def published(names: Sequence[str] = tuple(RECIPES), none: bool = True) -> dict[str, Change]:
    """Published objectives against each other (`fakit.recipes`), each by its name, beside labels alone ("none").

    Args:
        names: which recipes; all unless given.
        none: also the experiment without any teacher.

    Raises:
        ValueError: a recipe that is not known, or that comes twice.

    >>> published(["pkd", "gkd"], none=False)
    {'pkd': {'recipe': 'pkd'}, 'gkd': {'recipe': 'gkd'}}
    """
    found: dict[str, Change] = {"none": partial(_with_arm, "none")} if none else {}
    for name in names:
        named(name)
        if name in found:
            raise ValueError(f"recipes: found {list(names)}, in which one comes twice.")
        found[name] = {"recipe": name}
    return found


def grid(without: Sequence[Mapping[str, str]] = (), **factors: Mapping[str, Changes]) -> dict[str, Change]:
    """Every combination of the levels of several factors; `fakit report` says what each level is worth.

    Args:
        without: combinations that cannot be run, or are left out, as {factor: level}; one that names some of the
            factors stands for all levels of the others.
        factors: factor → name of a level → its changes. The arm's name is its levels, joined by ", ".

    Raises:
        ValueError: fewer than two factors or levels; a level whose name has a comma, by which names are joined; a key
            that two factors change; in `without`, a factor or a level that is not there, or nothing left.

    >>> arms = grid(student={"deep": {}, "flat": {"student.layers": 1}}, labels={"all": {}, "few": {"task.labels": 9}})
    >>> list(arms), arms["flat, few"]
    (['deep, all', 'deep, few', 'flat, all', 'flat, few'], {'student.layers': 1, 'task.labels': 9})
    """
    if len(factors) < 2:
        raise ValueError(f"grid: found {', '.join(factors) or 'no factor'}; one factor alone is a mapping of arms.")
    keys: dict[str, str] = {}
    for factor, levels in factors.items():
        if not isinstance(levels, Mapping) or len(levels) < 2:
            raise ValueError(f"grid.{factor}: found {levels!r}, expected at least two levels and their changes.")
        for name, changes in levels.items():
            if not isinstance(name, str) or "," in name or not name.strip():
                raise ValueError(f"grid.{factor}: the level {name!r} is no name, which is text without a comma.")
            if not isinstance(changes, Mapping):
                raise ValueError(
                    f"grid.{factor}.{name}: found {changes!r}, expected changes: {{features.weight: 0.1}}."
                )
            for key in changes:
                if keys.setdefault(key, factor) != factor:
                    raise ValueError(f"grid: {key} is changed by {keys[key]} and by {factor}; let one of them do it.")
    for number, aside in enumerate(without):
        where = f"grid.without[{number}]"
        if not isinstance(aside, Mapping) or not aside:
            raise ValueError(f"{where}: found {aside!r}, expected levels by factor: {{student: deep, labels: few}}.")
        for factor, level in aside.items():
            if factor not in factors or level not in factors[factor]:
                there = factors.get(factor, factors)
                raise ValueError(
                    f"{where}.{factor}: {level!r} is not in the grid, which has {', '.join(map(str, there))}."
                )
    made: dict[str, Change] = {}
    for levels in product(*(of.items() for of in factors.values())):
        names = dict(zip(factors, (name for name, _ in levels), strict=True))
        if not any(all(names[factor] == level for factor, level in aside.items()) for aside in without):
            made[", ".join(names.values())] = {key: value for _, changes in levels for key, value in changes.items()}
    if not made:
        raise ValueError("grid.without: leaves no combination to run.")
    return made


def _is_factor(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) and number >= 0


def _times(term: str, factor: float, config: ExperimentConfig, seed: int) -> Changes:
    has = [*config.transfers, *(["task"] if config.task_weight is not None and highest(config.task_weight) else [])]
    if term not in has:
        raise ValueError(f"the weight of {term!r} was to be changed; this experiment has the terms {', '.join(has)}.")
    if term in config.terms:
        own = config.terms[term]
        return {"terms": {**config.terms, term: {**own, "weight": times(factor, own.get("weight", 1.0))}}}
    key = "task_weight" if term == "task" else f"{term}.weight"
    return {key: times(factor, attrgetter(key)(config))}


KINDS: dict[str, Callable[..., dict[str, Change]]] = {
    "arms": arms,
    "maps": maps,
    "weights": weights,
    "recipes": published,
    "grid": grid,
}
"""The functions that a file names: `vary: arms`, `vary: {kind: maps, student_layers: 3, teacher_layers: 6}`."""


def read_vary(given: Any) -> Any:
    """`vary:` of a file as `Study` takes it: what a kind makes of its options; names and their changes as they are.

    Raises:
        ValueError: a kind that is not there, or options that it does not take.
    """
    given = {"kind": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        return given
    kind, options = given["kind"], {key: value for key, value in given.items() if key != "kind"}
    if kind not in KINDS:
        raise ValueError(
            f"vary.kind: {kind!r} is not one of {', '.join(KINDS)}; names and their changes are written without a "
            f"kind.{did_you_mean(kind, KINDS)}"
        )
    makes = KINDS[kind]
    takes = inspect.signature(makes).parameters
    try:
        return makes(**options)
    except TypeError as error:
        found = ", ".join(map(str, options)) or "nothing"
        raise ValueError(f"vary: {kind} takes {', '.join(takes)}; found {found} ({error}).") from error
    except ValueError as error:
        raise ValueError(f"vary: {error}") from error
