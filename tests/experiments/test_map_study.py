"""The map study: which maps it trains, that they are paired, and that scores are read back as they were recorded."""

import json
from itertools import pairwise

import pytest

from fakit.experiments import MapStudyConfig, StudyConfig, map_scores, run_map_study, study_from_yaml
from fakit.experiments.map_study import CONTROLS, SIMILARITY, increasing_maps, random_pairs

SMALL = {
    "task": {"name": "reviews", "labels": 16},
    "student": {"layers": 6},
    "outputs": None,
    "training": {"steps": 1, "batch_size": 4, "max_length": 8},
}


def test_every_increasing_map_is_there_once():
    maps = increasing_maps(3, 6)
    assert len({tuple(m.pairs) for m in maps}) == len(maps) == 20
    for layer_map in maps:
        assert [s for s, _ in layer_map.pairs] == [1, 2, 3]
        assert all(a < b for (_, a), (_, b) in pairwise(layer_map.pairs))
        assert layer_map.name == "-".join(str(t) for _, t in layer_map.pairs)


def test_runs_differ_in_nothing_but_map_and_seed():
    study = MapStudyConfig.from_dict({"maps": "increasing", "experiments": [SMALL], "seeds": [0, 1, 2]})
    runs = study.runs(6, 6)
    assert len(runs) == 3 * (1 + len(CONTROLS)) == len({run.run_id for run in runs})
    same = {json.dumps(run.replace(seed=0, name=None, layer_map="none").to_dict()) for run in runs}
    assert len(same) == 1
    assert {run.arm for run in runs} >= set(CONTROLS)


def test_the_random_map_is_of_the_seed_and_in_no_order():
    draws = [random_pairs(3, 6, seed) for seed in range(20)]
    assert draws[0] == random_pairs(3, 6, 0) and len(set(draws)) > 10
    assert any(a > b for draw in draws for (_, a), (_, b) in pairwise(draw))
    assert {t for draw in draws for _, t in draw} == set(range(1, 7))


def test_a_file_with_maps_is_a_map_study_and_another_is_one_of_arms():
    assert isinstance(study_from_yaml("configs/maps.yaml"), MapStudyConfig)
    assert isinstance(study_from_yaml("configs/study.yaml"), StudyConfig)
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        study_from_yaml("nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: found none"),
        ({"seeds": [1, 1]}, "one comes twice"),
        ({"experiments": [SMALL, SMALL]}, "one for each task"),
        ({"maps": "all"}, "increasing"),
    ],
)
def test_a_study_that_could_not_be_paired_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MapStudyConfig.from_dict({"maps": "increasing", "experiments": [SMALL], **changes})


def test_a_study_is_run_scored_read_back_and_continued(tmp_path):
    study = MapStudyConfig.from_dict({"maps": "increasing", "experiments": [SMALL], "seeds": [0], "texts": 8})
    run_map_study(study, tmp_path, progress=False)
    cka = json.loads((tmp_path / SIMILARITY).read_text())["reviews"]["cka"]
    assert (len(cka), len(cka[0])) == (7, 7)
    scores = map_scores(tmp_path).set_index("map")
    assert set(scores.index) == {m.name for m in increasing_maps(6, 6)} | set(CONTROLS)
    first = scores.loc["1-2-3-4-5-6"]
    assert first["cka"] == pytest.approx(sum(cka[i][i] for i in range(1, 7)) / 6)
    assert first["score"] == pytest.approx(first["scores"][0]) and 0 <= first["score"] <= 1
    assert scores["cka"].isna().to_dict()["none"] and scores["cka"].notna().sum() == len(scores) - 1
    lines = (tmp_path / "runs.jsonl").read_text()
    run_map_study(study, tmp_path, progress=False)  # nothing is left to do
    assert (tmp_path / "runs.jsonl").read_text() == lines


def test_a_folder_without_a_map_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"similarity\.json"):
        map_scores("data/recorded/study")
