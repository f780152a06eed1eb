import re
import sys
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fakit.experiments.report import report, study_figures
from fakit.experiments.statistics import paired_table
from fakit.experiments.store import RunStore
from fakit.experiments.table import study_table, to_markdown

SCORES = {
    ("glosses", "none"): [0.75, 0.76, 0.74],
    ("glosses", "outputs"): [0.80, 0.82, 0.81],
    ("glosses", "all"): [0.81, 0.83, 0.81],
    ("glosses", "none, equal compute"): [0.76, 0.77, 0.75],
    ("scans", "none"): [0.20, 0.22, 0.21],
    ("scans", "outputs"): [0.15, 0.16, 0.17],
    ("scans", "all"): [0.12, 0.13, 0.15],
}
BASELINES = {
    ("glosses", "teacher"): 0.85,
    ("glosses", "untrained"): 0.40,
    ("scans", "teacher"): 0.08,
    ("scans", "copy"): 0.13,
}


def _record(task, arm, seed, score, kind="run", **more):
    metric = "cer" if task == "scans" else "accuracy"
    record = {
        "run_id": f"{task}-{arm}-{seed}-{len(more)}",
        "kind": kind,
        "task": task,
        "arm": arm,
        "seed": seed,
        "metric": metric,
        "score": score,
        "higher_is_better": task != "scans",
        "test": {metric: score},
        "config": {"layer_map": "uniform", "seed": seed},
    }
    if kind == "run":
        record["test"]["agreement"] = 0.9
        record |= {"steps": 150 if "equal" in arm else 100, "flops": 1e12 if arm == "none" else 1.5e12}
    return {**record, **more}


@pytest.fixture
def store(tmp_path):
    store = RunStore.open(tmp_path / "runs", what="a made-up study")
    for (task, arm), scores in SCORES.items():
        for seed, score in enumerate(scores):
            store.append_run(_record(task, arm, seed, score))
    for (task, arm), score in BASELINES.items():
        store.append_run(_record(task, arm, 0, score, kind="baseline"))
    return store


def test_study_table_holds_the_numbers_of_the_statistics(store):
    table = study_table(store).set_index(["task", "arm"])
    assert len(table) == len(SCORES) + len(BASELINES)
    row = table.loc[("glosses", "all")]
    low, high = stats.ttest_rel(SCORES["glosses", "all"], SCORES["glosses", "outputs"]).confidence_interval()
    assert (row["gain_over_outputs_low"], row["gain_over_outputs_high"]) == pytest.approx((low, high))
    assert row["gain_over_none"] == pytest.approx(np.mean(SCORES["glosses", "all"]) - 0.75)
    assert row["gains_over_none"] == pytest.approx([0.06, 0.07, 0.07])
    assert row["gap_closed"] == pytest.approx((np.mean(SCORES["glosses", "all"]) - 0.75) / (0.85 - 0.75))
    assert row["gap_closed_low"] < row["gap_closed"] < row["gap_closed_high"]
    assert (row["n"], row["steps"], row["flops"], row["agreement"]) == (3, 100, 1.5e12, pytest.approx(0.9))
    scans = table.loc[("scans", "all")]
    assert scans["gain_over_none"] == pytest.approx(0.21 - np.mean(SCORES["scans", "all"]))  # fewer errors: positive
    assert scans["gain_over_none_low"] < scans["gain_over_none"] < scans["gain_over_none_high"]
    assert scans["gap_closed"] == pytest.approx((0.21 - np.mean(SCORES["scans", "all"])) / (0.21 - 0.08))
    assert np.isnan(table.loc[("glosses", "none"), "gap_closed"])
    assert table.loc[("scans", "copy"), "mean"] == 0.13
    assert (table.loc[table["kind"] == "baseline", "n"] == 1).all()


def test_markdown_says_the_same(store):
    text = to_markdown(study_table(store))
    glosses, scans = text.split("\n\n")[:2]
    assert glosses.startswith("| glosses | test accuracy % (higher is better) | gain over none | gain over outputs |")
    assert scans.startswith("| scans | test cer % (lower is better) |")
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in text.splitlines() if row}
    half = stats.t.ppf(0.975, 2) * np.std([75, 76, 74], ddof=1) / np.sqrt(3)
    none = glosses.splitlines()[2].split("|")
    assert none[2].strip() == f"75.0 [{75 - half:.1f}, {75 + half:.1f}]"
    assert [cell.strip() for cell in none[3:5]] == ["–", f"{-6:+.1f} [{-6 - half:+.1f}, {-6 + half:+.1f}]"]
    assert cells["none, equal compute"][-3:] == ["3", "150", "1.5"]
    assert cells["*copy*"] == ["13.0", "–", "–", "–", "–", "–", "–", "–"]
    assert "nan" not in text
    widths = {row.count("|") for row in text.splitlines() if row}
    assert len(widths) == 1


def test_gains_are_paired_against_the_arms_asked_for(store):
    table = study_table(store, baselines=["outputs", "all"])
    assert [column for column in table if column.startswith("pairs_with_")] == ["pairs_with_outputs", "pairs_with_all"]
    scores = {arm: np.array(SCORES["glosses", arm]) for arm in ("none", "outputs", "all")}
    row = table.set_index(["task", "arm"]).loc[("glosses", "none")]
    assert row["gains_over_all"] == pytest.approx(scores["none"] - scores["all"])
    start = scores["outputs"].mean()  # the gap is closed from the first baseline on
    assert row["gap_closed"] == pytest.approx((0.75 - start) / (0.85 - start))
    assert "| gain over outputs | gain over all | gap closed |" in to_markdown(table)
    assert "| gain over all | gap closed |" in (only := to_markdown(table, ["all"])) and "over outputs" not in only
    assert {name for name in study_figures(table, ["all"]) if name.startswith("gain")} == {"gain_over_all"}
    made = report(store, baselines=["outputs"])
    assert "of the way from `outputs` to the teacher" in made.text and set(made.figures) >= {"gain_over_outputs"}
    assert "gains_over_outputs" not in (made.path / "table.csv").read_text()
    with pytest.raises(
        ValueError, match=r"baselines: 'al' is not among the arms of .*, which are none, outputs, all.*'all'"
    ):
        study_table(store, baselines=["none", "al"])


def test_a_report_is_written_and_needs_no_network(store, tmp_path):
    made = report(store.path, tmp_path / "out")
    names = {"scores_by_arm", "gain_over_none", "gain_over_outputs", "pareto_glosses", "pareto_scans"}
    assert set(made.figures) == names
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == names
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == len(names)
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page.replace('xlink:href="#', 'href="#'))
    assert "<script" not in page and "@import" not in page
    body = page[page.index("<table>") : page.index("</table>")]
    assert len(ElementTree.fromstring(body + "</table>").findall("tbody/tr")) == 4 + 2
    assert "<td>none, equal compute</td>" in page and "<em>teacher</em>" in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert text == made._repr_markdown_() and text in str(made)
    assert "a made-up study" in text and "21 runs, seeds 0, 1, 2" in text
    for name in re.findall(r"\]\(figures/(\w+)\.svg\)", text):
        ElementTree.parse(tmp_path / "out" / "figures" / f"{name}.svg")
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["mean"].tolist() == pytest.approx(study_table(store)["mean"].tolist())
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 25


def test_figures_show_gains_with_better_to_the_right(store):
    made = report(store)
    assert made.path == store.path / "report"
    summary = made.figures["gain_over_none"].summary
    low, high = stats.ttest_rel(SCORES["scans", "none"], SCORES["scans", "all"]).confidence_interval()
    assert (
        f"all on scans {100 * (0.21 - np.mean(SCORES['scans', 'all'])):+.3g} ({100 * low:+.3g} to {100 * high:+.3g})"
        in summary
    )
    assert "teacher 8" in made.figures["scores_by_arm"].summary


def test_a_report_says_what_each_level_of_a_grid_is_worth(tmp_path):
    store = RunStore.open(tmp_path / "runs", what="a grid")
    scores = {"a, x": [0.5, 0.6], "a, y": [0.6, 0.7], "b, x": [0.5, 0.62], "b, y": [0.64, 0.74]}
    for arm, of_arm in scores.items():
        for seed, score in enumerate(of_arm):
            store.append_run(_record("glosses", arm, seed, score))
    text = report(store).text
    assert "| glosses: what a level is worth | gain in accuracy (points) | p (Holm) | seeds |" in text
    (low, high) = stats.t.interval(0.95, 1, 11.5, stats.sem([12.0, 11.0]))
    assert f"| y against x | +11.50 [{low:+.2f}, {high:+.2f}] |" in text and "| b against a | +2.50 [" in text
    assert "| b with y against each (interaction) | +3.00 [" in text
    # arms beside the grid change nothing of it, however they differ in themselves
    store.append_run(_record("glosses", "none", 0, 0.4))
    store.append_run(_record("glosses", "none", 1, 0.4, config={"layer_map": "last", "seed": 1}))
    store.append_run(_record("glosses", "a, x, equal compute", 0, 0.4))
    assert "| y against x | +11.50" in report(store).text
    backwards = RunStore.open(tmp_path / "backwards", what="a grid")  # as workers may finish
    for arm, of_arm in reversed(scores.items()):
        for seed, score in enumerate(of_arm):
            backwards.append_run(_record("glosses", arm, seed, score))
    assert "| y against x | +11.50" in report(backwards).text
    named = RunStore.open(tmp_path / "named", what="a grid", arms=["b, y", "b, x", "a, y", "a, x"])
    for arm, of_arm in scores.items():
        named.append_run(_record("glosses", arm, 0, of_arm[0]))
    assert "| x against y | -12.00 | – | 1 |" in report(named).text  # as the study names them
    unfinished = RunStore.open(tmp_path / "others", what="a grid")
    for arm, of_arm in list(scores.items())[:3]:
        unfinished.append_run(_record("glosses", arm, 0, of_arm[0]))
    assert "what a level is worth" not in report(unfinished).text


def test_compressions_are_compared_as_runs_are(tmp_path):
    store = RunStore.open(tmp_path / "runs", what="compressions")
    for arm, scores in {"layerwise": [0.7, 0.72], "low rank, bottom": [0.8, 0.83]}.items():
        for seed, score in enumerate(scores):
            record = _record("glosses", arm, seed, score, kind="compression")
            if arm == "layerwise":
                record["steps"] = 150
            store.append_run(record)
    table = study_table(store, ["layerwise"]).set_index("arm")
    assert (table["kind"] == "run").all() and table.loc["layerwise", "steps"] == 150
    assert table.loc["low rank, bottom", "gain_over_layerwise"] == pytest.approx(0.105)
    row = next(line for line in report(store).text.splitlines() if line.startswith("| low rank, bottom |"))
    assert row.endswith("| 2 | – | – |")


def test_one_run_makes_a_report_without_intervals(tmp_path):
    store = RunStore.open(tmp_path)
    store.append_run(_record("glosses", "all", 0, 0.8))
    made = report(store)
    assert made.figures == {}
    assert "| all | 80.0 |" in made.text and "two seeds" in made.text


def test_runs_of_one_arm_in_several_ways_are_told_apart(store):
    for seed, score in enumerate([0.70, 0.71, 0.72]):
        config = {"layer_map": "reverse", "seed": seed}
        store.append_run(_record("glosses", "all", seed, score, run_id=f"reverse-{seed}", config=config))
    table = study_table(store).set_index(["task", "arm"])
    assert table.loc[("glosses", "all · layer_map=reverse"), "mean"] == pytest.approx(0.71)
    assert table.loc[("glosses", "all · layer_map=uniform"), "mean"] == pytest.approx(np.mean(SCORES["glosses", "all"]))
    assert ("scans", "all") in table.index and ("glosses", "none") in table.index


def test_no_runs_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"is no runs directory: looked for manifest\.json, found no such folder"):
        report(tmp_path / "nowhere")
    RunStore.create(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no finished run yet"):
        report(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report").exists()


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds_of_one_arm(tmp_path):
    store = RunStore.open(tmp_path)
    rates, scores = [1e-3, 1e-3, 2e-3], [0.7, 0.8, 0.9]
    for seed, (rate, score) in enumerate(zip(rates, scores, strict=True)):
        for arm, more in (("none", 0.0), ("all", 0.05)):
            config = {"seed": seed, "training": {"learning_rate": rate, "log_every": seed + 1}}
            store.append_run(_record("glosses", arm, seed, score + more, config=config))
    table = study_table(store).set_index("arm")
    assert {arm: (row["n"], row["mean"]) for arm, row in table.iterrows()} == {
        "none · training.learning_rate=0.001": (2, pytest.approx(0.75)),
        "none · training.learning_rate=0.002": (1, pytest.approx(0.9)),
        "all · training.learning_rate=0.001": (2, pytest.approx(0.8)),
        "all · training.learning_rate=0.002": (1, pytest.approx(0.95)),
    }
    with pytest.raises(ValueError, match=r"glosses, arm none: .* \(config\.training\.learning_rate: 0\.001, 0\.002\)"):
        paired_table(store.runs(), "score", "none")


def test_runs_of_other_versions_are_no_seeds_of_one_arm(tmp_path):
    store = RunStore.open(tmp_path)
    here = store.manifest["versions"]["torch"]
    store.append_run(_record("glosses", "all", 0, 0.5))  # of before: the directory's versions
    for seed, torch_version in ((1, here), (2, "9.9")):
        versions = {name: store.manifest["versions"][name] for name in ("fakit", "transformers")}
        store.append_run(_record("glosses", "all", seed, 0.7, versions={**versions, "torch": torch_version}))
    table = study_table(store).set_index("arm")
    assert table["n"].to_dict() == {f"all · versions.torch={here}": 2, "all · versions.torch=9.9": 1}


def test_two_files_of_one_name_and_one_file_of_two_contents_are_two_tasks(tmp_path):
    store = RunStore.open(tmp_path)
    for number, name in enumerate(("a/animals.csv", "b/animals.csv")):
        for seed in range(2):
            config = {"seed": seed, "task": {"name": name}}
            score = 0.5 + 0.3 * number + 0.01 * seed
            store.append_run(_record("animals.csv", "all", seed, score, run_id=f"{name}{seed}", config=config))
    for seed, data in enumerate(("aa", "aa", "bb")):
        store.append_run(_record("films", "all", seed, 0.6 + 0.01 * seed, data=data))
    made = report(store)
    assert made.table.set_index("task")["mean"].to_dict() == {
        "animals.csv · task.name=a/animals.csv": pytest.approx(0.505),
        "animals.csv · task.name=b/animals.csv": pytest.approx(0.805),
        "films · data=aa": pytest.approx(0.605),
        "films · data=bb": pytest.approx(0.62),
    }


def test_figures_of_names_that_look_alike_do_not_overwrite_each_other(tmp_path):
    store = RunStore.open(tmp_path)
    for task, score in (("a b", 0.5), ("a-b", 0.6), ("A.b", 0.7)):
        for seed in range(2):
            store.append_run(_record(task, "all", seed, score + 0.01 * seed))
    made = report(store)
    files = sorted(path.stem for path in (made.path / "figures").iterdir() if path.stem.startswith("pareto"))
    assert files == ["pareto_a_b", "pareto_a_b_2", "pareto_a_b_3"]
    titles = {(made.path / "figures" / f"{name}.svg").read_text().count("A.b: what compute buys") > 0 for name in files}
    assert titles == {True, False}


def test_a_diverged_student_is_shown_without_a_score_and_averaged_nowhere(store):
    for seed in range(2):
        store.append_run(_record("glosses", "diverged", seed, None))
    store.append_run(_record("glosses", "half", 0, 0.5))
    store.append_run(_record("glosses", "half", 1, None))
    made = report(store)
    table = made.table.set_index(["task", "arm"])
    assert (table.loc[("glosses", "diverged"), "n"], table.loc[("glosses", "diverged"), "no_score"]) == (0, 2)
    assert np.isnan(table.loc[("glosses", "diverged"), "mean"])
    assert (table.loc[("glosses", "half"), "mean"], table.loc[("glosses", "half"), "no_score"]) == (0.5, 1)
    assert "| diverged | – |" in made.text and "| 0 (and 2 without a score) |" in made.text
    assert "left out of every mean: glosses, half: 1; glosses, diverged: 2." in made.text
    assert "nan" not in made.text and "diverged" not in made.figures["scores_by_arm"].summary


def test_where_a_report_cannot_go_is_said_before_the_work(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fakit.experiments.report"], "study_table", lambda *_: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="where the report would go, cannot be written to"):
        report(store, tmp_path / "file" / "report")
