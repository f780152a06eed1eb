"""The map study: which maps it trains, that they are paired, and that scores are read back as they were recorded."""

import json
from itertools import pairwise

import pytest

from fakit.experiments import MapStudyConfig, RunStore, StudyConfig, map_scores, report, run_map_study, study_from_yaml
from fakit.experiments.map_report import map_correlations
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


def recorded(tmp_path, unfinished: bool = False):
    """A map study as a store holds it, of made-up scores: 2 seeds (and a third that a stop cut short), quality rising with CKA."""
    study = MapStudyConfig.from_dict(
        {"maps": "increasing", "experiments": [SMALL], "seeds": [0, 1, 2][: 2 + unfinished]}
    )
    store = RunStore.open(tmp_path, what=study.what)
    cka = [[1 - abs(2 * s - t) / 10 for t in range(7)] for s in range(4)]
    (tmp_path / SIMILARITY).write_text(json.dumps({"reviews": {"cka": cka}}))
    for number, config in enumerate(study.runs(3, 6)):
        if config.seed == 2 and number % 2:
            continue
        pairs = [] if config.layer_map == "none" else config.layer_map
        score = 0.5 + sum(cka[s][t] for s, t in pairs) / 10 + config.seed / 100
        store.append_run(
            {
                **{"run_id": config.run_id, "kind": "run", "task": "reviews", "arm": config.arm, "seed": config.seed},
                **{"metric": "accuracy", "score": score, "higher_is_better": True, "test": {"agreement": score}},
                "config": config.to_dict(),
            }
        )
    return store


@pytest.mark.parametrize("unfinished", [False, True])
def test_the_report_says_what_the_records_hold(tmp_path, unfinished):
    recorded(tmp_path, unfinished)
    made = report(tmp_path, tmp_path / "out")
    assert set(made.table["seeds"]) == {(0, 1)}  # of the third, maps are missing
    assert (
        "ρ of CKA and test accuracy over 20 increasing maps is +1.00 [+1.00, +1.00]: more similar maps teach better"
        in made.text
    )
    assert "the monotone map of highest CKA (2-4-6) is number 1" in made.text
    assert "`last` (4-5-6) is number" in made.text
    best = next(line for line in made.text.splitlines() if line.startswith("| 2-4-6"))
    assert best == "| 2-4-6 | 1.00 | 80.5 | +30.0 [+30.0, +30.0] | 80.5 % |"
    assert (tmp_path / "out/figures/maps.svg").is_file() and (tmp_path / "out/table.csv").is_file()


def test_where_quality_falls_with_similarity_the_report_says_so(tmp_path):
    store = recorded(tmp_path)
    found = json.loads((tmp_path / SIMILARITY).read_text())
    found["reviews"]["cka"] = [[1 - value for value in row] for row in found["reviews"]["cka"]]
    (tmp_path / SIMILARITY).write_text(json.dumps(found))
    rho = map_correlations(map_scores(store.path))["reviews"]
    assert rho.mean == pytest.approx(-1) and rho.high < 0
    assert "more similar maps teach worse" in report(store, tmp_path / "out").text
