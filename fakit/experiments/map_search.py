"""Search for a layer map on a small budget: many maps a little, the better half of them longer, and so on.

A map that was chosen on some examples is judged on others; `search_maps` refuses a search that would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fakit.layer_maps import LayerMap

if TYPE_CHECKING:
    from fakit.experiments.build import Prepared
    from fakit.experiments.config import ExperimentConfig

Score = Callable[[LayerMap, int], float]
"""(map, steps) → quality of a student trained with the map for so many steps, larger is better."""


@dataclass(frozen=True)
class Round:
    """One round: what each map still in it scored after `steps` steps, best first."""

    steps: int
    scores: tuple[tuple[LayerMap, float], ...]


@dataclass(frozen=True)
class MapSearch:
    """What a search found; draws itself in a notebook.

    Attributes:
        best: the map that won the last round.
        rounds: all rounds, first to last.
        steps: training steps taken in all.
        choosing, evaluation: how many texts it was chosen on, and how many are left to judge it on.
    """

    best: LayerMap
    rounds: tuple[Round, ...]
    steps: int
    choosing: int
    evaluation: int

    def __str__(self) -> str:
        first, last = self.rounds[0], self.rounds[-1]
        return (
            f"{self.best.name} of {len(first.scores)} maps, {last.scores[0][1]:.4g} after {last.steps} steps; "
            f"{self.steps} steps in {len(self.rounds)} rounds, chosen on {self.choosing} texts, to be judged on "
            f"{self.evaluation} others"
        )

    def _repr_markdown_(self) -> str:
        header = "| map | " + " | ".join(f"{r.steps} steps" for r in self.rounds) + " |"
        lines = [header, "|---" * (len(self.rounds) + 1) + "|"]
        order = list(dict.fromkeys(m for r in reversed(self.rounds) for m, _ in r.scores))
        found = [dict(r.scores) for r in self.rounds]
        for layer_map in order:
            cells = " | ".join(f"{scores[layer_map]:.4g}" if layer_map in scores else "–" for scores in found)
            mark = "**" if layer_map == self.best else ""
            lines.append(f"| {mark}{layer_map.name}{mark} | {cells} |")
        return "\n".join([*lines, "", f"{self}."])


def search_maps(
    candidates: Sequence[LayerMap],
    train_and_score: Score,
    budget: int,
    *,
    choosing: Iterable[str],
    evaluation: Iterable[str],
    keep: float = 0.5,
) -> MapSearch:
    """Successive halving (Jamieson & Talwalkar 2016): each round takes an equal share of the budget and keeps the
    better maps.

    Args:
        candidates: at least two different maps.
        train_and_score: trains a student with a map for so many steps, from the same start every time, and scores it on
            the texts of `choosing`, larger is better. A round's students start anew. Where it has a method `check`,
            that is asked about every map first, and raises where it could not train with one.
        budget: training steps in all, over all maps and rounds.
        choosing: the texts that `train_and_score` scores on.
        evaluation: the texts that the chosen map is going to be judged on.
        keep: the share of maps that go on to the next round.

    Raises:
        ValueError: before any training: texts that choose and evaluate, fewer than two maps, a map given twice, a
            budget that gives a map no step, `keep` not in (0, 1), a map that `train_and_score.check` refuses. During
            the search: a score that is not finite.

    >>> maps = [LayerMap([(1, t)], name=f"T{t}") for t in range(1, 5)]
    >>> found = search_maps(maps, lambda m, steps: -abs(m.pairs[0][1] - 3), 80, choosing=["a"], evaluation=["b"])
    >>> found.best.name, [r.steps for r in found.rounds]
    ('T3', [10, 20])
    """
    choosing, evaluation = list(choosing), list(evaluation)
    check_disjoint(choosing, evaluation)
    alive = list(candidates)
    if len(alive) < 2 or len(set(alive)) < len(alive):
        names = ", ".join(layer_map.name for layer_map in alive) or "none"
        raise ValueError(f"a search needs two different maps at least, each once; found {names}.")
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}: the share of maps that goes on to the next round lies between 0 and 1.")
    sizes = _sizes(len(alive), keep)
    steps = [budget // (len(sizes) * size) for size in sizes]
    if steps[0] < 1:
        raise ValueError(
            f"a budget of {budget} steps over {len(sizes)} rounds gives {len(alive)} maps no step in the first; "
            f"{len(sizes) * len(alive)} is the least."
        )
    for layer_map in alive:
        getattr(train_and_score, "check", lambda _: None)(layer_map)
    rounds = []
    for size, each in zip(sizes, steps, strict=True):
        alive = alive[:size]
        scored = [(layer_map, float(train_and_score(layer_map, each))) for layer_map in alive]
        if wrong := [layer_map.name for layer_map, score in scored if not math.isfinite(score)]:
            raise ValueError(
                f"the scores of {', '.join(wrong)} after {each} steps are not finite: nothing to choose by."
            )
        scored.sort(key=lambda pair: -pair[1])  # stable: of equals the earlier candidate
        rounds.append(Round(each, tuple(scored)))
        alive = [layer_map for layer_map, _ in scored]
    used = sum(size * each for size, each in zip(sizes, steps, strict=True))
    return MapSearch(alive[0], tuple(rounds), used, len(choosing), len(evaluation))


def check_disjoint(choosing: Iterable[str], evaluation: Iterable[str]) -> None:
    """Refuse to judge a choice on what it was made on.

    Raises:
        ValueError: a side without texts, or texts on both sides (case and white space do not count), with an example.
    """
    sides = [{" ".join(text.lower().split()): text for text in texts} for texts in (choosing, evaluation)]
    for name, side in zip(("choosing", "evaluation"), sides, strict=True):
        if not side:
            raise ValueError(f"{name}: no texts; a map is chosen on some examples and judged on others.")
    if both := sides[0].keys() & sides[1].keys():
        raise ValueError(
            f"{len(both)} of {len(sides[0])} texts that choose the map would also judge it, e.g. "
            f"{sides[0][min(both)]!r}: a choice looks better than it is on what it was made on. Take them out of one "
            "side."
        )


def experiment_scorer(config: ExperimentConfig, prepared: Prepared | None = None) -> Score:
    """`train_and_score` by `run_experiment`: the configuration with its map and steps replaced,
    scored on the validation split.

    Choose on `task.validation`, judge on `task.test`. Error rates are turned round, so that larger is better. A map
    whose pairs weigh differently (`LayerMap.emd`) or are drawn anew every epoch (`LayerMap.random`)
    is a ValueError before any training.
    """
    return _ExperimentScorer(config, prepared)


@dataclass(frozen=True)
class _ExperimentScorer:
    config: ExperimentConfig
    prepared: Prepared | None

    def check(self, layer_map: LayerMap) -> None:
        """Raise ValueError for what a configuration, which holds pairs alone, would silently leave out of a map."""
        weights = layer_map.pair_weights
        if layer_map.is_random:
            what = "is drawn anew every epoch"
        elif weights and min(weights) < (1 - 1e-6) * max(weights):  # equal flows of a solver differ by rounding
            what = f"weighs its pairs {[round(weight, 4) for weight in weights]}"
        else:
            return
        raise ValueError(
            f"map {layer_map.name} {what}, and is written into `layer_map` of an ExperimentConfig as its pairs alone, "
            "of equal weight and the same all along: another map would be scored under its name. Search among "
            f"LayerMap(layer_map.pairs, name={layer_map.name!r}), which is fixed and unweighted, or score it with a "
            "function of your own that trains with the map itself."
        )

    def __call__(self, layer_map: LayerMap, steps: int) -> float:
        from fakit.experiments.run import run_experiment

        self.check(layer_map)
        run = self.config.replace(layer_map=tuple(layer_map.pairs) or "none", **{"training.steps": steps})
        result = run_experiment(run, progress=False, prepared=self.prepared, count_flops=False)
        value = result.validation[result.metric]
        return value if result.higher_is_better else -value


def _sizes(maps: int, keep: float) -> list[int]:
    """Maps of each round, down to two."""
    sizes = [maps]
    while sizes[-1] > 2:
        sizes.append(max(2, min(sizes[-1] - 1, math.ceil(sizes[-1] * keep))))
    return sizes
