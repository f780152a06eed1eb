"""Search of a map on a small budget: halves kept, budget kept, and never chosen and judged on the same texts."""

from types import SimpleNamespace

import pytest

from fakit import LayerMap
from fakit.experiments.map_search import check_disjoint, experiment_scorer, search_maps
from fakit.experiments.vary import increasing_maps

MAPS = increasing_maps(2, 4)  # 1-2, 1-3, 1-4, 2-3, 2-4, 3-4
TEXTS = {"choosing": ["a cat", "a dog"], "evaluation": ["a cow"]}


def quality(layer_map, steps):
    """2-4 is best; more steps tell it from 1-3, which looks better at first."""
    return {"2-4": steps / 100, "1-3": 0.15 + steps / 1000}.get(layer_map.name, -layer_map.pairs[0][1])


def test_halves_go_on_with_more_steps_within_the_budget():
    calls = []

    def score(layer_map, steps):
        calls.append((layer_map.name, steps))
        return quality(layer_map, steps)

    found = search_maps(MAPS, score, 180, **TEXTS)
    assert [(r.steps, len(r.scores)) for r in found.rounds] == [(10, 6), (20, 3), (30, 2)]
    assert found.best.name == "2-4"
    assert found.rounds[0].scores[0][0].name == "1-3"  # which a single short round would have chosen
    assert found.steps == sum(steps for _, steps in calls) == 180
    assert (found.choosing, found.evaluation) == (2, 1)
    assert str(found).startswith("2-4 of 6 maps, 0.3 after 30 steps; 180 steps in 3 rounds, chosen on 2 texts")
    assert (
        "| **2-4** | 0.1 | 0.2 | 0.3 |" in found._repr_markdown_() and "| 1-4 | -1 | – | – |" in found._repr_markdown_()
    )


def test_texts_that_choose_may_not_judge():
    def never(layer_map, steps):
        raise AssertionError("trained before the texts were looked at")

    with pytest.raises(ValueError, match=r"1 of 2 texts that choose the map would also judge it, e\.g\. 'A  dog'"):
        search_maps(MAPS, never, 180, choosing=["a cat", "A  dog"], evaluation=["a cow", "a dog"])
    for missing in ({"choosing": []}, {"evaluation": []}):
        with pytest.raises(ValueError, match=f"{next(iter(missing))}: no texts"):
            search_maps(MAPS, never, 180, **(TEXTS | missing))
    check_disjoint(["a"], ["b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 17}, "a budget of 17 steps over 3 rounds gives 6 maps no step in the first; 18 is the least"),
        ({"candidates": MAPS[:1]}, "two different maps at least, each once; found 1-2"),
        ({"candidates": [*MAPS, MAPS[0]]}, "two different maps at least, each once"),
        ({"keep": 1.0}, "keep is 1.0"),
        ({"train_and_score": lambda layer_map, steps: float("nan")}, "scores of 1-2, .* after 10 steps are not finite"),
    ],
)
def test_refusals(changes, message):
    arguments = {"candidates": MAPS, "train_and_score": quality, "budget": 180} | changes
    with pytest.raises(ValueError, match=message):
        search_maps(**arguments, **TEXTS)


def test_two_maps_are_one_round():
    found = search_maps(MAPS[:2], quality, 40, **TEXTS)
    assert [(r.steps, len(r.scores)) for r in found.rounds] == [(20, 2)] and found.best.name == "1-3"


def test_a_search_by_real_trainings(config):
    """`run_experiment` under the search: the same map and steps give the same score, on the validation split."""
    score = experiment_scorer(config)
    maps = [LayerMap([(1, 1), (2, 4)], name="ends"), LayerMap.uniform(2, 4)]
    found = search_maps(maps, score, 4, **TEXTS)
    assert found.rounds[0].steps == 2 and found.steps == 4
    assert 0 <= found.rounds[0].scores[0][1] <= 1
    assert score(found.best, 2) == found.rounds[0].scores[0][1]


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        (
            LayerMap([(1, 1), (1, 2), (2, 4)], [0.2, 0.3, 0.5], name="emd"),
            r"map emd weighs its pairs \[0\.2, 0\.3, 0\.5\], .*pairs alone.* LayerMap\(layer_map\.pairs, name='emd'\)",
        ),
        (
            LayerMap.random(2, 4),
            r"map random is drawn anew every epoch, .*pairs alone.* LayerMap\(layer_map\.pairs, name='random'\)",
        ),
    ],
)
def test_a_map_that_a_configuration_cannot_say_is_refused_before_any_training(monkeypatch, config, layer_map, message):
    def never(*args, **kwargs):
        raise AssertionError("trained before the maps were looked at")

    monkeypatch.setattr("fakit.experiments.run.run_experiment", never)
    score = experiment_scorer(config)
    with pytest.raises(ValueError, match=message):
        score(layer_map, 2)
    with pytest.raises(ValueError, match=message):  # also where it comes last
        search_maps([LayerMap.uniform(2, 4), layer_map], score, 4, **TEXTS)


def test_pairs_of_equal_weight_are_what_a_configuration_says(monkeypatch, config):
    asked = []

    def run(run_config, **options):
        asked.append(run_config.layer_map)
        return SimpleNamespace(validation={"accuracy": 0.5}, metric="accuracy", higher_is_better=True)

    monkeypatch.setattr("fakit.experiments.run.run_experiment", run)
    score = experiment_scorer(config)
    third = LayerMap([(1, 1), (1, 2), (2, 4)], [1 / 3, 1 / 3, 1 - 2 / 3])  # as a flow comes out of a solver
    assert [score(layer_map, 2) for layer_map in (third, LayerMap.none())] == [0.5, 0.5]
    assert asked == [((1, 1), (1, 2), (2, 4)), "none"]
