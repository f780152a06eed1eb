"""The map study: which maps it trains, that they are paired, and that scores are read back as they were recorded."""

import json
from itertools import pairwise

import pytest

from fakit.experiments import RunStore, Study, map_scores, maps, report
from fakit.experiments import study as study_module
from fakit.experiments.build import prepare
from fakit.experiments.map_report import map_correlations, map_markdown
from fakit.experiments.map_study import SIMILARITY, recorded_similarity, similarity
from fakit.experiments.students import make_student
from fakit.experiments.vary import CONTROLS, increasing_maps, random_pairs

SMALL = {
    "task": {"name": "reviews", "labels": 16},
    "student": {"layers": 6},
    "outputs": None,
    "training": {"steps": 1, "batch_size": 4, "max_length": 8},
}


def of_maps(student_layers, teacher_layers, **more):
    kind = {"kind": "maps", "student_layers": student_layers, "teacher_layers": teacher_layers}
    plain = {"base": SMALL, "vary": kind, "similarity_texts": 8, "baselines": False, "count_flops": False}
    return Study.from_dict({**plain, **more})


def test_every_increasing_map_is_there_once():
    maps = increasing_maps(3, 6)
    assert len({tuple(m.pairs) for m in maps}) == len(maps) == 20
    for layer_map in maps:
        assert [s for s, _ in layer_map.pairs] == [1, 2, 3]
        assert all(a < b for (_, a), (_, b) in pairwise(layer_map.pairs))
        assert layer_map.name == "-".join(str(t) for _, t in layer_map.pairs)


def test_runs_differ_in_nothing_but_map_and_seed():
    runs = of_maps(6, 6).runs()
    assert len(runs) == 3 * (1 + len(CONTROLS)) == len({run.run_id for run in runs})
    same = {json.dumps(run.replace(seed=0, name=None, layer_map="none").to_dict()) for run in runs}
    assert len(same) == 1
    assert {run.arm for run in runs} >= set(CONTROLS)


def test_the_random_map_is_of_the_seed_and_in_no_order():
    draws = [random_pairs(3, 6, seed) for seed in range(20)]
    assert draws[0] == random_pairs(3, 6, 0) and len(set(draws)) > 10
    assert any(a > b for draw in draws for (_, a), (_, b) in pairwise(draw))
    assert {t for draw in draws for _, t in draw} == set(range(1, 7))


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (
            maps(2, 6),
            "a student of 6 layers with a teacher of 6, as reviews has .* student_layers: 6, teacher_layers: 6",
        ),
        ({"as it is": {}}, "other arms than as it is: give vary"),
    ],
)
def test_similarity_is_asked_of_all_the_maps_or_not_at_all(vary, message, tmp_path):
    study = Study.from_dict({"base": SMALL, "vary": vary, "similarity_texts": 8, "baselines": False})
    with pytest.raises(ValueError, match=message):
        study.run(tmp_path, progress=False)
    assert len(RunStore(tmp_path)) == 0 and not (tmp_path / SIMILARITY).exists()


def test_a_study_is_run_scored_read_back_and_continued(config, tmp_path, monkeypatch):
    base = config.replace(outputs=None, **{"student.layers": 4, "training.steps": 1})
    study = of_maps(4, 4, base=base.to_dict(), seeds=[0])
    study.run(tmp_path, progress=False)
    ((task, measured),) = json.loads((tmp_path / SIMILARITY).read_text()).items()
    cka = measured["cka"]
    assert base.task.name.endswith(task) and (len(cka), len(cka[0])) == (5, 5)
    scores = map_scores(tmp_path).set_index("map")
    assert set(scores.index) == {m.name for m in increasing_maps(4, 4)} | set(CONTROLS)
    first = scores.loc["1-2-3-4"]
    assert first["cka"] == pytest.approx(sum(cka[i][i] for i in range(1, 5)) / 4)
    assert first["score"] == pytest.approx(first["scores"][0]) and 0 <= first["score"] <= 1
    assert scores["cka"].isna().to_dict()["none"] and scores["cka"].notna().sum() == len(scores) - 1
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr(study_module, "record_similarity", lambda *_: pytest.fail("measured again"))
    study.run(tmp_path, progress=False)  # nothing is left to do
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_texts_that_are_recorded_are_those_that_were_measured(config):
    prepared = prepare(config)
    student = make_student(config, prepared).model
    for asked, measured in ((512, len(prepared.task.pool)), (16, 16)):
        assert similarity(student, prepared, asked)["texts"] == measured <= 512 / 2


def test_a_folder_without_a_map_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"similarity\.json"):
        map_scores("data/recorded/study")
    with pytest.raises(ValueError, match="holds no map study"):
        map_scores(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()  # asking makes no folder


def test_a_student_deeper_than_its_teacher_has_no_increasing_map():
    with pytest.raises(ValueError, match=r"7 student layers .* the teacher has 6"):
        increasing_maps(7, 6)


def recorded(folder, keep=lambda config: True, seeds=(0, 1), tasks=("reviews",), metric="accuracy"):
    """A map study as a store holds it, of made-up scores, quality rising with CKA;
    `keep` says which runs a stop left.
    """
    experiments = [{**SMALL, "task": {"name": task, "labels": 16}} for task in tasks]
    study = of_maps(3, 6, base=experiments, seeds=list(seeds))
    store = RunStore.open(folder, what=study.what)
    cka = [[1 - abs(2 * s - t) / 10 for t in range(7)] for s in range(4)]
    (folder / SIMILARITY).write_text(json.dumps({task: {"cka": cka} for task in tasks}))
    for config in filter(keep, study.runs()):
        store.append_run(record(config, cka, metric))
    return store


def record(config, cka, metric="accuracy"):
    pairs = [] if config.layer_map == "none" else config.layer_map
    quality = 0.5 + sum(cka[s][t] for s, t in pairs) / 10 + config.seed / 100
    higher = metric == "accuracy"
    score = quality if higher else 1 - quality
    return {
        **{"run_id": config.run_id, "kind": "run", "task": config.task.name, "arm": config.arm, "seed": config.seed},
        **{"metric": metric, "score": score, "higher_is_better": higher, "test": {"agreement": quality}},
        "config": config.to_dict(),
    }


def test_the_report_says_what_the_records_hold(tmp_path):
    recorded(tmp_path)
    made = report(tmp_path, tmp_path / "out")
    assert set(made.table["seeds"]) == {(0, 1)}
    assert "Left out" not in made.text
    assert (
        "ρ of CKA and test accuracy over 20 increasing maps is +1.00 [+1.00, +1.00]: more similar maps teach better"
        in made.text
    )
    assert "the monotone map of highest CKA (2-4-6) is number 1" in made.text
    assert "`last` (4-5-6) is number" in made.text
    best = next(line for line in made.text.splitlines() if line.startswith("| 2-4-6"))
    assert best == "| 2-4-6 | 1.00 | 80.5 | +30.0 [+30.0, +30.0] | 80.5 % |"
    assert (tmp_path / "out/figures/maps.svg").is_file() and (tmp_path / "out/table.csv").is_file()


def test_of_an_error_rate_the_lowest_is_the_best(tmp_path):
    recorded(tmp_path, metric="cer")
    made = report(tmp_path, tmp_path / "out")
    assert (
        "ρ of CKA and test cer over 20 increasing maps is +1.00 [+1.00, +1.00]: more similar maps teach better"
        in made.text
    )
    assert "the monotone map of highest CKA (2-4-6) is number 1" in made.text
    assert "| test cer % (lower is better) |" in made.text
    rows = [line for line in made.text.splitlines() if line.startswith("|")]
    assert rows[2] == "| 2-4-6 | 1.00 | 19.5 | +30.0 [+30.0, +30.0] | 80.5 % |" and rows[-1].startswith(
        "| *none* | – | 49.5 "
    )
    assert "the best, 2-4-6, 19.5" in made.figures["maps"].summary


def half(config):
    return int(config.run_id[-1], 16) % 2 == 0


def test_only_whole_seeds_enter_and_the_others_are_named(tmp_path):
    """Stopped within the second seed of the second task; what is whole gives the numbers that it alone would give."""
    tasks = ("reviews", "glosses")
    store = recorded(tmp_path / "stopped", lambda c: c.seed == 0 or (c.task.name == "reviews" or half(c)), tasks=tasks)
    found = sum(record["task"] == "glosses" and record["seed"] == 1 for record in store.records())
    assert 0 < found < 23
    with pytest.warns(UserWarning, match=rf"left out, .*: glosses, seed 1 \({found} of 23 maps\)"):
        table = map_scores(store.path)
    assert table.groupby("task")["seeds"].agg(set).to_dict() == {"glosses": {(0,)}, "reviews": {(0, 1)}}
    alone = map_scores(recorded(tmp_path / "alone", lambda c: c.seed == 0, tasks=tasks).path)
    of_glosses = [frame[frame["task"] == "glosses"].reset_index(drop=True) for frame in (table, alone)]
    assert of_glosses[0].equals(of_glosses[1])
    with pytest.warns(UserWarning, match="left out"):
        made = report(store, tmp_path / "out")
    assert f"Left out, since maps are missing: glosses, seed 1 ({found} of 23 maps)." in made.text


def test_a_task_without_a_whole_seed_is_left_out_and_named(tmp_path):
    store = recorded(tmp_path, lambda c: c.seed == 0 and c.task.name == "reviews", tasks=("reviews", "glosses"))
    with pytest.warns(UserWarning, match="left out"):
        made = report(store, tmp_path / "out")
    assert set(made.table["task"]) == {"reviews"} and "glosses, seed 0 (0 of 23 maps)" in made.text


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda c: c.arm not in ("none", "4-5-6"), r"reviews, seed 0 \(21 of 23 maps\)"),
        (lambda c: c.arm == "2-4-6", r"reviews, seed 0 \(1 of 23 maps\)"),
        (lambda c: False, r"reviews, no seed \(0 of 23 maps\)"),
    ],
)
def test_a_study_stopped_within_its_first_seed_has_no_scores(tmp_path, keep, message):
    store = recorded(tmp_path, keep, seeds=(0,))
    for read in (map_scores, report):
        with pytest.raises(ValueError, match=rf"no seed has all the maps .*: {message}.* goes on"):
            read(store.path)


def test_runs_that_are_no_part_of_the_plan_count_for_nothing(tmp_path):
    """A baseline, and an arm of another study in the same folder."""
    store = recorded(tmp_path)
    before = map_scores(store.path)
    other = {**store.records()[0], "arm": "all", "score": 9.0}
    store.append_run({**other, "run_id": "all"})
    store.append_run({**other, "run_id": "teacher", "arm": "teacher", "kind": "baseline", "seed": None})
    assert map_scores(store.path).equals(before)


def test_what_belongs_to_two_studies_is_refused(tmp_path):
    store = recorded(tmp_path)
    first = store.records()[0]
    store.append_run({**first, "run_id": "again"})
    with pytest.raises(ValueError, match=rf"map 1-2-3 of reviews, seed 0, is recorded twice: {first['run_id']}, again"):
        map_scores(store.path)


def test_runs_of_a_task_without_similarity_are_refused(tmp_path):
    store = recorded(tmp_path)
    found = json.loads((tmp_path / SIMILARITY).read_text())
    (tmp_path / SIMILARITY).write_text(json.dumps({"glosses": found["reviews"]}))
    with pytest.raises(ValueError, match=r"holds runs of reviews, .* similarity of glosses"):
        map_scores(store.path)


def test_a_map_that_the_table_does_not_have_has_no_place(tmp_path):
    table = map_scores(recorded(tmp_path).path)
    cka = recorded_similarity(tmp_path)
    with pytest.raises(ValueError, match=r"map 2-4-6 is not among the 19 increasing maps of reviews"):
        map_markdown(table[table["map"] != "2-4-6"], map_correlations(table), cka)


def test_gains_are_paired_against_the_maps_asked_for(tmp_path):
    store = recorded(tmp_path)
    made = report(store, tmp_path / "out", baselines=["reverse", "1-2-3"])
    assert "| paired gain over reverse | paired gain over 1-2-3 | agreement |" in made.text
    table = made.table.set_index("map")["score"]
    cells = next(line for line in made.text.splitlines() if line.startswith("| 2-4-6")).split(" | ")
    gains = [float(cell.split(" [")[0]) for cell in cells[3:5]]
    assert gains == pytest.approx([100 * (table["2-4-6"] - table[name]) for name in ("reverse", "1-2-3")], abs=0.05)
    with pytest.raises(ValueError, match="baselines: 'upside down' is not among the maps, which are 2-4-6"):
        report(store, tmp_path / "out", baselines=["upside down"])


def test_where_quality_falls_with_similarity_the_report_says_so(tmp_path):
    store = recorded(tmp_path)
    found = json.loads((tmp_path / SIMILARITY).read_text())
    found["reviews"]["cka"] = [[1 - value for value in row] for row in found["reviews"]["cka"]]
    (tmp_path / SIMILARITY).write_text(json.dumps(found))
    rho = map_correlations(map_scores(store.path))["reviews"]
    assert rho.mean == pytest.approx(-1) and rho.high < 0
    assert "more similar maps teach worse" in report(store, tmp_path / "out").text
